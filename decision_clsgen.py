"""transformers' decision models (`pipeline("decision")`, `/v1/systemone`): the head answers there, with its reason."""

import json
from dataclasses import dataclass
from typing import Any

import torch
from transformers.decision import DecisionConfig, DecisionMixin, Question, parse_questions

from .prediction_clsgen import Prediction

_EXAMPLE = '{"state": <text or fields>, "questions": {"answer": {"type": "noul"}}}'


@dataclass
class ExplainedQuestion(Question):
    """A question whose answer has the head's decision and a reason beside it."""

    truncated: bool = False
    prediction: Prediction | None = None

    def answer(self, probabilities: list[float]) -> dict[str, Any]:
        """transformers' answer, with the label of the model's threshold as `choice`, not the likelier one."""
        answer, prediction = super().answer(probabilities), self.prediction
        if prediction is None:
            return answer
        if self.type == "choice":
            of_choice = answer["probabilities"][prediction.label]
            answer |= {"choice": prediction.label, "confidence": max(0.0, 2 * of_choice - 1)}
        answer |= {"label": prediction.label, "threshold": prediction.threshold, "truncated": self.truncated}
        if prediction.explanation is not None:
            answer |= {"explanation": prediction.explanation, "explanation_cut": prediction.explanation_cut}
        return answer


class ClsGenDecisionConfig(DecisionConfig):
    """Encodes a decision request as the prompt that the head was trained on.

    Args:
        model ([`ClsGenForCausalLMAndClassification`]): Whose prompt, question and labels these are.
        explain (`bool`, *optional*, defaults to `True`): Whether answers carry an `explanation`.
    """

    def __init__(self, model: Any, explain: bool = True):
        super().__init__()
        self.model = model
        self.explain = explain

    def prepare_inputs(self, request: dict[str, Any] | str, processor: Any) -> list[tuple[dict, list[Question]]]:
        """One prompt, the same for every question.

        Args:
            request (`dict` or JSON `str`): `state` is a text as `classify` takes it. A question is the model's own,
                in the form `noul` (true is label 1) or `choice` (`criteria` has the two labels' names).

        Raises:
            ValueError: for another question: the head would answer its own in its place.
        """
        request = json.loads(request) if isinstance(request, str) else request
        if not isinstance(request, dict) or not {"state", "questions"} <= set(request):
            raise ValueError(f"A request looks like {_EXAMPLE}.")
        if request.get("assets"):
            raise ValueError("This model reads text only: leave `assets` out.")
        prompt = self.model.encoder.encode(request["state"])
        questions = [
            self._checked(question, prompt.truncated) for question in parse_questions(request["questions"], self)
        ]
        ids = torch.tensor([prompt.input_ids])
        return [({"input_ids": ids, "marks": torch.tensor([ids.shape[1]])}, questions)]

    def _checked(self, question: Question, truncated: bool) -> ExplainedQuestion:
        own, names = self.model.encoder.prompt.question, self.model.config.label_names
        if question.instructions not in (None, "", own):
            raise ValueError(
                f"Question {question.name!r}: this model answers one question, {own!r}. Ask that, or leave "
                "`instructions` out."
            )
        if question.type == "score" or (question.type == "choice" and set(question.options) != set(names)):
            raise ValueError(
                f"Question {question.name!r}: ask for `noul`, or for a `choice` with the criteria {names}."
            )
        if any(question.descriptions):
            raise ValueError(f"Question {question.name!r}: the labels' meaning is learned; leave descriptions out.")
        return ExplainedQuestion(**vars(question), truncated=truncated)


class ClsGenDecisionMixin(DecisionMixin):
    """Makes a model a decision model, without the files and the loading of the decision heads that are built in."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return super(DecisionMixin, cls).from_pretrained(*args, **kwargs)

    def post_init(self) -> None:
        super(DecisionMixin, self).post_init()

    def save_pretrained(self, *args, **kwargs) -> None:
        super(DecisionMixin, self).save_pretrained(*args, **kwargs)

    @property
    def decision_config(self) -> ClsGenDecisionConfig:
        """How requests become prompts; `decision_config.explain = False` gives numbers alone."""
        if getattr(self, "_decision_config", None) is None:
            self._decision_config = ClsGenDecisionConfig(self)
        return self._decision_config

    @torch.inference_mode()
    def decide(
        self,
        input_ids: torch.LongTensor,
        marks: torch.LongTensor,
        decision_questions: list[ExplainedQuestion],
        decision_config: ClsGenDecisionConfig | None = None,
        **kwargs,
    ) -> list[torch.Tensor]:
        """Log-probabilities of each question's options, from one prefill that an explanation then goes on from.

        Args:
            input_ids (`torch.LongTensor` of shape `(1, sequence_length)`): See [`ClsGenDecisionConfig`].
            marks (`torch.LongTensor` of shape `(1,)`): The number of tokens before the decision: all of them.
            decision_questions (`list[ExplainedQuestion]`): Get their prediction here.
            decision_config ([`ClsGenDecisionConfig`], *optional*): Defaults to the model's.
        """
        explain = getattr(decision_config or self.decision_config, "explain", False)
        prediction = self._decide(input_ids[0, : int(marks[-1])].tolist(), explain)
        scores = torch.tensor([1 - prediction.probability, prediction.probability]).log()
        found = []
        for question in decision_questions:
            question.prediction = prediction
            options = ["false", "true"] if question.type == "noul" else self.config.label_names
            found.append(scores[[options.index(option) for option in question.options]])
        return found
