"""From the head's logit to an answer: calibration, base rate, threshold, abstention, and what they are told as."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Attribution:
    """What one sentence, or neighbouring ones of a long text, does to the answer.

    Args:
        field (`str`): The field of the text that holds the sentence; `"text"` where the text is one string.
        start, end (`int`): Characters of that field, `field_value[start:end]`.
        score (`float`): The logit with the sentence, less that without it: above 0, it speaks for label 1.
    """

    field: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Prediction:
    """The answer to the task's question about one text.

    Args:
        label (`str`): Name of the label given.
        label_id (`int`): 1 where `probability >= threshold`, else 0.
        positive_label (`str`): Name of label 1.
        probability (`float`): Calibrated, of label 1.
        logit (`float`): Before calibration: of the head, corrected for the `pos_weight` of training, and pooled with
            the LM's reading where the model's `lm_reading_weight` says so.
        threshold (`float`): The decision threshold on `probability`.
        explanation (`str`, *optional*): In words; `None` from `classify`.
        explained_label (`str`, *optional*): The label of the verdict line before the explanation: the one that the
            words were told to argue for, or in `free` mode the LM's own, which may not be `label` (`None` where it
            wrote no verdict line).
        explanation_cut (`bool`, *optional*): Whether the explanation was stopped before its end, as by
            `max_new_tokens`, and may lack its conclusion; `None` without an explanation.
        lm_probability (`float`, *optional*): The LM's own probability of the verdict of label 1 against that of label
            0, without a hint, re-based to `prior` too. `None` from `classify` of a model whose `lm_reading_weight` is
            0.
        truncated (`bool`): Whether the text was too long, and read without the middle of its document.
        prior (`float`, *optional*): The base rate that `probability` was re-based to, if asked for.
        prediction_set (`tuple[str, ...]`, *optional*): Labels that can't be ruled out at the model's conformal error
            rate; `None` for a model without one.
        attributions (`tuple[Attribution, ...]`, *optional*): What each sentence does to the answer, if asked for.
    """

    label: str
    label_id: int
    positive_label: str
    probability: float
    logit: float
    threshold: float
    explanation: str | None = None
    explained_label: str | None = None
    explanation_cut: bool | None = None
    lm_probability: float | None = None
    truncated: bool = False
    prior: float | None = None
    prediction_set: tuple[str, ...] | None = None
    attributions: tuple[Attribution, ...] | None = None

    @property
    def disagreement(self) -> float | None:
        """Distance of the LM's own reading from the number, in [0, 1]; an evaluation tells if it points to errors."""
        return None if self.lm_probability is None else abs(self.probability - self.lm_probability)

    @property
    def abstained(self) -> bool | None:
        """Whether the text is one to hand to a person: `prediction_set` is another than the label given, alone.

        The threshold, and `prior`, decide for a label; they may do so for one that the set rules out.
        """
        return None if self.prediction_set is None else self.prediction_set != (self.label,)

    def to_dict(self) -> dict[str, Any]:
        """The prediction as JSON-serialisable values."""
        values = asdict(self)
        for name in ("prediction_set", "attributions"):
            values[name] = None if values[name] is None else list(values[name])
        return {**values, "disagreement": self.disagreement, "abstained": self.abstained}

    def __str__(self) -> str:
        notes = [f"P({self.positive_label}) = {self.probability:.3f}", f"threshold {self.threshold:.3f}"]
        if self.prior is not None:
            notes.append(f"at a base rate of {self.prior:g}")
        head = f"{self.label} ({', '.join(notes)})"
        if self.abstained:
            left = " or ".join(self.prediction_set) or "unlike either label's validation rows"
            other = self.prediction_set and self.label not in self.prediction_set
            head += f", uncertain: {left}" + (" by its prediction set" if other else "")
        if self.truncated:
            head += ", text truncated"
        if self.explained_label not in (None, self.label):
            head += f", explained for {self.explained_label}"
        if self.explanation_cut:
            head += ", explanation cut"
        return head if self.explanation is None else f"{head}: {self.explanation}"


class NoNumberError(ValueError):
    """The head's logit, or the LM's reading, of some texts is not a number, so nothing can be said about them.

    Args:
        texts (`list[int]`): Their places among the texts given.
    """

    reason = (
        "The head's logit or the LM's reading is not a number: hidden states overflowed, or weights are broken. If "
        "the model runs in float16, load it with `dtype=torch.bfloat16` or `torch.float32`."
    )

    def __init__(self, texts: list[int]):
        super().__init__(f"{len(texts)} text(s), {texts}: {self.reason}")
        self.texts = texts


@dataclass(frozen=True)
class DecisionRule:
    """Turns raw head logits, and the LM's readings where they count, into predictions.

    Args:
        labels (`tuple[str, str]`): Names of label 0 and label 1.
        pos_weight, temperature, bias, threshold, lm_reading_weight (`float`): See [`ClsGenConfig`].
        base_rate (`float`, *optional*): Share of label 1 among the rows that calibration was fitted on.
        conformal_quantiles (`tuple[float, float]`, *optional*): Largest nonconformity score `1 - p(label)` at which
            each label stays in the prediction set.
    """

    labels: tuple[str, str]
    pos_weight: float
    temperature: float
    bias: float
    threshold: float
    base_rate: float | None = None
    conformal_quantiles: tuple[float, float] | None = None
    lm_reading_weight: float = 0.0

    @classmethod
    def from_config(cls, config: Any) -> "DecisionRule":
        """The rule of a [`ClsGenConfig`]."""
        return cls(
            labels=tuple(config.label_names),
            pos_weight=config.pos_weight,
            temperature=config.calibration["temperature"],
            bias=config.calibration["bias"],
            threshold=config.threshold,
            base_rate=config.base_rate,
            conformal_quantiles=tuple(config.conformal["quantiles"]) if config.conformal else None,
            lm_reading_weight=config.lm_reading_weight,
        )

    def logits(self, cls_logits: torch.FloatTensor, readings: torch.FloatTensor | None = None) -> torch.FloatTensor:
        """The number's logits: the head's, corrected for `pos_weight`, pooled with the LM's readings.

        A logarithmic opinion pool of two (Genest and Zidek, 1986, "Combining Probability Distributions"), which for
        a binary question is a weighted mean of log-odds.

        Args:
            cls_logits (`torch.FloatTensor` of any shape): The head's, raw.
            readings (`torch.FloatTensor`, *optional*): Of the same shape; needed where `lm_reading_weight` is not 0.

        Returns:
            `torch.FloatTensor` of the same shape, float64.
        """
        logits = cls_logits.double() - math.log(self.pos_weight)
        if not self.lm_reading_weight:
            return logits
        return (1 - self.lm_reading_weight) * logits + self.lm_reading_weight * readings.double()

    def probabilities(self, logits: torch.FloatTensor) -> torch.FloatTensor:
        """What [`logits`] gives, calibrated."""
        return torch.sigmoid(logits / self.temperature + self.bias)

    def prior_shift(self, prior: float | None) -> float:
        """What re-basing to `prior` adds to the calibrated log-odds.

        Saerens, Latinne and Decaestecker, 2002, "Adjusting the Outputs of a Classifier to New a Priori Probabilities":
        odds are multiplied by the ratio of the new prior odds to those of the calibration rows.

        Raises:
            TypeError, ValueError: for a prior that is no number in (0, 1), or a model that holds no base rate.
        """
        if prior is None:
            return 0.0
        if isinstance(prior, bool) or not isinstance(prior, int | float):
            raise TypeError(f"`prior` is a number between 0 and 1, got {type(prior).__name__}.")
        if not 0 < prior < 1:
            raise ValueError(f"`prior` must lie between 0 and 1, both excluded, got {prior}.")
        if self.base_rate is None:
            raise ValueError(
                "This model doesn't know the base rate that it was calibrated at, so it can't be moved to another. "
                "Set `model.config.base_rate` to the share of label 1 among its validation rows."
            )
        return math.log(prior / (1 - prior)) - math.log(self.base_rate / (1 - self.base_rate))

    def _rebased(self, probabilities: torch.FloatTensor, prior: float | None) -> torch.FloatTensor:
        shift = self.prior_shift(prior)
        return torch.sigmoid(torch.logit(probabilities) + shift) if shift else probabilities

    def labels_by_reading(self, readings: torch.FloatTensor, prior: float | None = None) -> list[int]:
        """What the LM's readings alone decide for: re-based and cut at the threshold as the number is.

        Where they are a part of the number they are calibrated as it is, since its threshold is on that scale.

        Args:
            readings (`torch.FloatTensor` of shape `(n,)`): See [`logits`].
            prior (`float`, *optional*): See [`prior_shift`].
        """
        readings = readings.double()
        probabilities = self.probabilities(readings) if self.lm_reading_weight else torch.sigmoid(readings)
        return (self._rebased(probabilities, prior) >= self.threshold).int().tolist()

    def predict(
        self,
        cls_logits: torch.FloatTensor,
        truncated: list[bool],
        prior: float | None = None,
        readings: torch.FloatTensor | None = None,
    ) -> list[Prediction]:
        """Predictions without explanations.

        Args:
            cls_logits, readings (`torch.FloatTensor` of shape `(n,)`): See [`logits`].
            truncated (`list[bool]`), prior (`float`, *optional*): See [`Prediction`].

        Raises:
            NoNumberError: for logits or readings that are nan; infinite ones are certain.
        """
        logits = self.logits(cls_logits, readings)
        broken = logits.isnan() if readings is None else logits.isnan() | readings.isnan()
        if broken.any():
            raise NoNumberError(broken.nonzero()[:, 0].tolist())
        probabilities = self.probabilities(logits)
        lm_probabilities = [None] * len(logits)
        if readings is not None:
            lm_probabilities = self._rebased(torch.sigmoid(readings.double()), prior).tolist()
        predictions = []
        for logit, at_base_rate, probability, lm_probability, was_cut in zip(
            logits.tolist(), probabilities.tolist(), self._rebased(probabilities, prior).tolist(), lm_probabilities,
            truncated, strict=True,
        ):  # fmt: skip
            label_id = int(probability >= self.threshold)
            predictions.append(
                Prediction(
                    label=self.labels[label_id],
                    label_id=label_id,
                    positive_label=self.labels[1],
                    probability=probability,
                    logit=logit,
                    threshold=self.threshold,
                    lm_probability=lm_probability,
                    truncated=was_cut,
                    prior=prior,
                    prediction_set=self._prediction_set(at_base_rate),
                )
            )
        return predictions

    def _prediction_set(self, probability: float) -> tuple[str, ...] | None:
        """Labels whose nonconformity is within their own quantile; no base rate matters, so before any re-basing."""
        if self.conformal_quantiles is None:
            return None
        nonconformity = (probability, 1 - probability)
        return tuple(
            label
            for label, score, quantile in zip(self.labels, nonconformity, self.conformal_quantiles, strict=True)
            if score <= quantile
        )
