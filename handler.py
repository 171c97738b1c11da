"""Hugging Face Inference Endpoints: the toolkit finds `EndpointHandler` beside the weights."""

from typing import Any

from transformers import AutoModel

PARAMETERS = {"explain", "mode", "prior", "attributions", "generate_kwargs"}
# What a request may ask of `generate`, which would also run code that an argument names.
GENERATE_KWARGS = {
    "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p", "num_beams", "repetition_penalty",
    "no_repeat_ngram_size",
}  # fmt: skip


class EndpointHandler:
    """Answers `{"inputs": ..., "parameters": {...}}`.

    Args:
        path (`str`): The checkpoint's folder.
    """

    def __init__(self, path: str = ""):
        self.model = AutoModel.from_pretrained(path, trust_remote_code=True, device_map="auto")

    def __call__(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """
        Args:
            data (`dict`): `inputs` is a text, its fields, or a list of either; `parameters` may hold `explain`
                (default true), `mode`, `prior`, `attributions` and `generate_kwargs` (of `GENERATE_KWARGS`).

        Returns:
            `list[dict]`: A prediction for each input (see `Prediction.to_dict`), in their order.

        Raises:
            ValueError, TypeError: for a request that can't be answered, saying why.
        """
        if not isinstance(data, dict) or "inputs" not in data:
            raise ValueError('A request is {"inputs": text or list of texts, "parameters": {...}}.')
        parameters = dict(data.get("parameters") or {})
        generate_kwargs = parameters.get("generate_kwargs") or {}
        for given, known in ((parameters, PARAMETERS), (generate_kwargs, GENERATE_KWARGS)):
            if unknown := sorted(set(given) - known):
                raise ValueError(f"Unknown parameter(s) {unknown}; known: {sorted(known)}.")
        texts = data["inputs"] if isinstance(data["inputs"], list) else [data["inputs"]]
        parameters.pop("generate_kwargs", None)
        if parameters.pop("explain", True):
            predictions = self.model.classify_and_explain(texts, **parameters, **generate_kwargs)
        else:
            parameters.pop("mode", None)
            predictions = self.model.classify(texts, **parameters)
        return [prediction.to_dict() for prediction in predictions]
