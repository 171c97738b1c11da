"""From logits to calibrated probabilities, and from those to a decision; both are fitted on validation rows."""

import logging
import math

import numpy as np
import torch
from numpy.typing import ArrayLike

from clsgen.classification_metrics import check_labels, check_probabilities

# In standard deviations of the logits: at this temperature the probability hardly depends on the logit any more.
MAX_STANDARD_TEMPERATURE = 100.0
THRESHOLD_METHODS = ("f1", "youden", "fixed")

logger = logging.getLogger(__name__)


def fit_temperature_and_bias(logits: ArrayLike, labels: ArrayLike, fit_bias: bool = True) -> tuple[float, float]:
    """Fits `probability = sigmoid(logit / temperature + bias)` to labels, by maximum likelihood.

    This is Platt scaling (Platt, 1999, "Probabilistic Outputs for Support Vector Machines") with the slope written as
    1 / temperature (Guo et al., 2017, "On Calibration of Modern Neural Networks") and held above 0, so that
    calibration never turns a ranking round. As in Platt's paper, the targets aren't 0 and 1 but `1 / (N- + 2)` and
    `(N+ + 1) / (N+ + 2)`, for N- and N+ rows of each label: on rows that the logit separates perfectly, hard targets
    would drive the temperature to 0 and every probability to 0 or 1. The effect dies out with the number of rows.

    The fit is deterministic: float64, L-BFGS from a fixed start, on standardised logits. Logits that rank the labels
    backwards or not at all give a very high temperature (100 standard deviations of the logits) and a warning; logits
    that are all equal give temperature 1 and the bias alone.

    Args:
        logits: Shape `(rows,)`, finite; with the shift by `log(pos_weight)` already undone.
        labels: Shape `(rows,)`, each 0 or 1, with both present.
        fit_bias (`bool`, *optional*, defaults to `True`): Whether to fit the bias; else it is 0.

    Returns:
        `tuple[float, float]`: temperature (above 0) and bias.

    Raises:
        ValueError: One label only; no rows; shapes that differ; a label other than 0 and 1; a logit that isn't finite.
    """
    labels = check_labels(labels, logits)
    _check_both_classes(labels)
    logits = torch.as_tensor(np.asarray(logits, dtype=np.float64))  # (rows,)
    if not torch.isfinite(logits).all():
        raise ValueError(f"Logits must be finite; {int((~torch.isfinite(logits)).sum())} of {len(logits)} are not.")
    targets = torch.as_tensor(_smoothed_targets(labels))  # (rows,)
    center, scale = logits.mean(), logits.std(correction=0)
    if scale <= 1e-12 * (1 + center.abs()):
        return 1.0, float(torch.logit(targets.mean()) - center) if fit_bias else 0.0
    if not fit_bias:
        center = torch.zeros(())
    standard_temperature, standard_bias = _minimise_nll((logits - center) / scale, targets, fit_bias)
    if standard_temperature >= MAX_STANDARD_TEMPERATURE:
        logger.warning("The logits don't rank the labels: the calibrated probability is nearly the same for all rows.")
    temperature = standard_temperature * float(scale)
    return temperature, standard_bias - float(center) / temperature


def calibrated_probabilities(logits: ArrayLike, temperature: float, bias: float) -> np.ndarray:
    """`sigmoid(logits / temperature + bias)` in float64, of the same shape as `logits`."""
    logits = torch.as_tensor(np.asarray(logits, dtype=np.float64))
    return torch.sigmoid(logits / temperature + bias).numpy()


def choose_threshold(labels: ArrayLike, probabilities: ArrayLike, method: str = "f1", fixed: float = 0.5) -> float:
    """Chooses the threshold at and above which a probability means the positive label.

    Candidates are the midpoints between neighbouring distinct values of the probabilities, with 0 and 1 at the ends.
    Among equally good ones, the nearest to 0.5 wins (the lower of two equally near).

    Args:
        labels: Shape `(rows,)`, each 0 or 1.
        probabilities: Shape `(rows,)`, the probability of label 1, in [0, 1].
        method (`str`, *optional*, defaults to `"f1"`): `"f1"` takes the highest F1 of the positive class, `"youden"`
            the highest J = true positive rate - false positive rate (Youden, 1950, "Index for rating diagnostic
            tests"), `"fixed"` returns `fixed`.
        fixed (`float`, *optional*, defaults to 0.5): The threshold for `"fixed"`.

    Returns:
        `float`: The threshold, in [0, 1].

    Raises:
        ValueError: An unknown method; `fixed` outside [0, 1]; no rows, shapes that differ, a label other than 0 and 1,
            a probability that is nan or outside [0, 1]; one label only (but for `"fixed"`).
    """
    if method not in THRESHOLD_METHODS:
        raise ValueError(f"Unknown threshold method {method!r}; known: {', '.join(THRESHOLD_METHODS)}.")
    if method == "fixed":
        return float(check_probabilities(fixed))
    labels, probabilities = check_labels(labels, probabilities), check_probabilities(probabilities)
    _check_both_classes(labels)
    candidates = threshold_candidates(probabilities)
    true_positives = _count_at_or_above(probabilities[labels == 1], candidates)
    false_positives = _count_at_or_above(probabilities[labels == 0], candidates)
    positive, negative = int(labels.sum()), int((1 - labels).sum())
    if method == "f1":
        # 2 TP / (2 TP + FP + FN), where TP + FN is the number of positive rows.
        scores = 2 * true_positives / (true_positives + false_positives + positive)
    else:
        # J times both class sizes: whole numbers, in which ties are exact.
        scores = true_positives * negative - false_positives * positive
    best = candidates[scores == scores.max()]
    return float(best[np.argmin(np.abs(best - 0.5))])


def threshold_candidates(probabilities: ArrayLike) -> np.ndarray:
    """Midpoints between neighbouring distinct probabilities, with 0 and 1 at the ends; rising, without repeats."""
    edges = np.concatenate([[0.0], np.unique(probabilities), [1.0]])
    return np.unique((edges[:-1] + edges[1:]) / 2)


def conformal_quantiles(labels: ArrayLike, probabilities: ArrayLike, error_rate: float) -> tuple[float, float]:
    """Largest nonconformity score `1 - p(label)` at which each label stays in a prediction set.

    Split-conformal prediction, by class (Mondrian; Vovk, 2012, "Conditional Validity of Inductive Conformal
    Predictors"): a new row of either label keeps its label in the set with a probability of at least
    `1 - error_rate`, whatever the model and the base rate, if it comes from where the validation rows of its label
    come from. By class, because a guarantee over both is met by failing the rarer; and because such a set is the same
    under every rising transformation of the logits, so that calibration may be fitted on the same rows.

    Args:
        labels: Shape `(rows,)`, each 0 or 1, with both present.
        probabilities: Shape `(rows,)`, the probability of label 1, in [0, 1].
        error_rate (`float`): In (0, 1).

    Returns:
        `tuple[float, float]`: For label 0 and label 1: the `ceil((n + 1) * (1 - error_rate))`-th smallest score of the
        label's n rows; 1.0, which rules nothing out, where n is too small for the error rate.

    Raises:
        ValueError: An error rate outside (0, 1); and as [`choose_threshold`] does.
    """
    if not 0 < error_rate < 1:
        raise ValueError(f"The conformal error rate must lie between 0 and 1, both excluded, got {error_rate}.")
    labels, probabilities = check_labels(labels, probabilities), check_probabilities(probabilities)
    _check_both_classes(labels)
    quantiles = []
    for label in (0, 1):
        of_label = probabilities[labels == label]
        scores = np.sort(1 - of_label if label else of_label)
        rank = math.ceil((len(scores) + 1) * (1 - error_rate) - 1e-9)
        if rank > len(scores):
            logger.warning(
                "%d validation rows of label %d are too few for a conformal error rate of %g: it is never ruled out.",
                len(scores), label, error_rate,
            )  # fmt: skip
        quantiles.append(float(scores[rank - 1]) if rank <= len(scores) else 1.0)
    return quantiles[0], quantiles[1]


def conformal_coverage(
    labels: ArrayLike, probabilities: ArrayLike, quantiles: tuple[float, float], threshold: float
) -> dict[str, float | list[float]]:
    """How prediction sets turn out on rows: `coverage` (of label 0, of label 1) and the share `abstained`.

    Args:
        labels, probabilities: Shape `(rows,)`, see [`conformal_quantiles`].
        quantiles (`tuple[float, float]`): As [`conformal_quantiles`] gives them.
        threshold (`float`): Decides for the label given; a row is abstained on where its set is another than that
            label alone, see [`Prediction.abstained`].

    Returns:
        `dict`: nan for the coverage of a label without rows.
    """
    labels, probabilities = check_labels(labels, probabilities), check_probabilities(probabilities)
    kept = np.stack([probabilities <= quantiles[0], 1 - probabilities <= quantiles[1]])
    coverage = [
        float(kept[label][labels == label].mean()) if (labels == label).any() else math.nan for label in (0, 1)
    ]
    given = (probabilities >= threshold).astype(int)
    answered = (kept.sum(axis=0) == 1) & kept[given, np.arange(len(given))]
    return {"coverage": coverage, "abstained": float((~answered).mean())}


def _check_both_classes(labels: np.ndarray) -> None:
    if labels.min() == labels.max():
        raise ValueError(f"Rows of both labels are needed; all {len(labels)} have label {labels[0]}.")


def _smoothed_targets(labels: np.ndarray) -> np.ndarray:
    positive = labels.sum()
    return np.where(labels == 1, (positive + 1) / (positive + 2), 1 / (len(labels) - positive + 2))


def _minimise_nll(logits: torch.Tensor, targets: torch.Tensor, fit_bias: bool) -> tuple[float, float]:
    """Temperature and bias of least mean negative log-likelihood, for standardised logits of shape `(rows,)`."""
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=fit_bias)
    optimizer = torch.optim.LBFGS(
        [log_temperature, bias] if fit_bias else [log_temperature],
        max_iter=500,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def temperature() -> torch.Tensor:
        return log_temperature.clamp(max=math.log(MAX_STANDARD_TEMPERATURE)).exp()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits / temperature() + bias, targets)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return float(temperature().detach()), float(bias.detach())


def _count_at_or_above(probabilities: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    return len(probabilities) - np.searchsorted(np.sort(probabilities), thresholds, side="left")
