"""`pipeline("text-classification", model=..., trust_remote_code=True)`: label, score and explanation."""

from typing import Any

from transformers import Pipeline


class ClsGenPipeline(Pipeline):
    """Text classification whose answers carry their reason.

    Call arguments:
        inputs (`str`, `dict` of the task's fields, or a list, generator or `Dataset` of them).
        top_k (`int`, *optional*, defaults to 1): 2 or `None` for the scores of both labels, the higher first.
        explain (`bool`, *optional*, defaults to `True`): Whether to write explanations.
        mode, prior: See `model.classify_and_explain`.
        generate_kwargs (`dict`, *optional*): For `generate`.

    Returns:
        For one input `[{"label", "score", "probability", "explanation"}]`: `score` is the probability of `label`,
        `probability` that of label 1, `label` the one that the threshold decides for. For several inputs a list of
        them; with `top_k`, in each place a list of `top_k`.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.tokenizer is not None:
            self.model.tokenizer = self.tokenizer

    def _sanitize_parameters(self, explain=None, mode=None, prior=None, generate_kwargs=None, **kwargs):
        forward = {"explain": explain, "mode": mode, "prior": prior, "generate_kwargs": generate_kwargs}
        unknown = set(kwargs) - {"top_k"}
        if unknown:
            raise TypeError(f"Unknown argument(s) {sorted(unknown)}; known: {sorted({*forward, 'top_k'})}.")
        return {}, {name: value for name, value in forward.items() if value is not None}, kwargs

    def __call__(self, inputs: Any, **kwargs) -> Any:
        result = super().__call__(inputs, **kwargs)
        return [result] if isinstance(inputs, str | dict) and "top_k" not in kwargs else result

    def get_iterator(self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params):
        """Predictions in the order of `inputs`; the model makes the batches, so that lengths in one are alike."""
        explain, options = self._options({**forward_params, "batch_size": batch_size if batch_size > 1 else None})
        predict = self.model.classify_and_explain_iter if explain else self.model.classify_iter
        for prediction in predict(inputs, **options):
            yield self.postprocess(prediction, **postprocess_params)

    @staticmethod
    def _options(forward_params: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
        options = dict(forward_params)
        explain = options.pop("explain", True)
        generate_kwargs = options.pop("generate_kwargs", {})
        if not explain:
            options.pop("mode", None)
        return explain, {**options, **(generate_kwargs if explain else {})}

    def preprocess(self, inputs: Any) -> dict[str, Any]:
        return {"text": inputs}

    def _forward(self, model_inputs: dict[str, Any], **forward_params) -> Any:
        explain, options = self._options(forward_params)
        predict = self.model.classify_and_explain if explain else self.model.classify
        return predict(model_inputs["text"], **options)

    def postprocess(self, prediction: Any, top_k: int | None = 1) -> Any:
        names = self.model.config.label_names
        order = [prediction.label_id] if top_k == 1 else sorted((0, 1), key=lambda i: -self._score(prediction, i))
        answers = [{"label": names[i], "score": self._score(prediction, i)} for i in order[:top_k]]
        extra = {"probability": prediction.probability, "explanation": prediction.explanation}
        for name in ("lm_probability", "prior", "abstained"):
            if getattr(prediction, name) is not None:
                extra[name] = getattr(prediction, name)
        for name in ("truncated", "explanation_cut"):
            if getattr(prediction, name):
                extra[name] = True
        answers = [{**answer, **extra} for answer in answers]
        return answers[0] if top_k == 1 else answers

    @staticmethod
    def _score(prediction: Any, label_id: int) -> float:
        return prediction.probability if label_id else 1 - prediction.probability
