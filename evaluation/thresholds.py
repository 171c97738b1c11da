"""The threshold sheet: thresholds for a wanted sensitivity, specificity, predictive value or cost.

They are fitted on validation rows, and told by what they do on others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from clsgen.calibration import threshold_candidates
from clsgen.classification_metrics import check_labels, check_probabilities
from clsgen.evaluation.intervals import SAMPLES, percentile_interval, share, undefined
from clsgen.evaluation.resampling import RankedRows, bootstrap_counts

Confusion = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # tp, fp, fn, tn: each (samples, thresholds)


@dataclass(frozen=True)
class Target:
    """What a threshold is chosen for.

    Args:
        kind (`str`): `"sensitivity"`, `"specificity"`, `"ppv"` or `"cost_ratio"`.
        value (`float`): The least share wanted; for `"cost_ratio"`, what a missed positive costs in false alarms.
    """

    kind: str
    value: float

    def __post_init__(self):
        if self.kind not in RULES:
            raise ValueError(f"Unknown kind of threshold {self.kind!r}; known: {', '.join(RULES)}.")
        if self.kind == "cost_ratio" and not (0 < self.value < float("inf")):
            raise ValueError(f"A cost ratio is a number above 0, got {self.value}.")
        if self.kind != "cost_ratio" and not 0 < self.value <= 1:
            raise ValueError(f"A wanted {self.kind} lies above 0 and at most at 1, got {self.value}.")


def _best(score: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Index of the best allowed threshold of each sample (the higher one of equals); -1 where none is allowed."""
    score = np.where(allowed, score, -np.inf)
    best = score.shape[1] - 1 - np.argmax(score[:, ::-1], axis=1)
    return np.where(allowed.any(axis=1), best, -1)


def _for_sensitivity(confusion: Confusion, wanted: float) -> np.ndarray:
    true_positives, false_positives, false_negatives, _ = confusion
    positive = true_positives + false_negatives
    allowed = true_positives >= wanted * positive - 1e-9
    # Of thresholds with as few false alarms, the one that finds more.
    return _best(true_positives / (positive + 1) - false_positives, allowed & (positive > 0))


def _for_specificity(confusion: Confusion, wanted: float) -> np.ndarray:
    true_positives, false_positives, _, true_negatives = confusion
    allowed = true_negatives >= wanted * (true_negatives + false_positives) - 1e-9
    return _best(true_positives, allowed & (true_negatives + false_positives > 0))


def _for_ppv(confusion: Confusion, wanted: float) -> np.ndarray:
    true_positives, false_positives, _, _ = confusion
    flagged = true_positives + false_positives
    return _best(true_positives, (flagged > 0) & (true_positives >= wanted * flagged - 1e-9))


def _for_cost_ratio(confusion: Confusion, ratio: float) -> np.ndarray:
    _, false_positives, false_negatives, _ = confusion
    return _best(-(ratio * false_negatives + false_positives), np.ones_like(false_positives, dtype=bool))


RULES: dict[str, Callable[[Confusion, float], np.ndarray]] = {
    "sensitivity": _for_sensitivity, "specificity": _for_specificity, "ppv": _for_ppv, "cost_ratio": _for_cost_ratio,
}  # fmt: skip
UNREACHABLE = "no threshold reaches it on the validation rows"


def fit_threshold(
    labels: ArrayLike, probabilities: ArrayLike, target: Target, samples: int = SAMPLES, seed: int = 0
) -> dict[str, Any]:
    """The threshold for a target, chosen on rows that are not reported on, with the percentile interval of its choice.

    Among the thresholds that reach the wanted sensitivity, the one with the fewest false positives; among those that
    reach the wanted specificity or predictive value, the one with the most true positives; for a cost ratio, the
    cheapest. Candidates are those of [`calibration.choose_threshold`].

    Args:
        labels, probabilities: Shape `(rows,)`, of the validation rows.
        target ([`Target`]): What for.
        samples, seed (`int`): Of the bootstrap.

    Returns:
        `dict`: `value`, `low`, `high`; None and a `reason` where no threshold reaches the target.
    """
    labels, probabilities = check_labels(labels, probabilities), check_probabilities(probabilities)
    candidates = threshold_candidates(probabilities)
    ranked = RankedRows(labels, probabilities)
    padded = np.r_[candidates, np.nan]  # what index -1 stands for

    def chosen(counts: np.ndarray) -> np.ndarray:
        true_positives, false_positives = ranked.at_or_above(counts, candidates)
        positive = (counts @ labels)[:, None]
        negative = counts.sum(axis=1, keepdims=True) - positive
        confusion = true_positives, false_positives, positive - true_positives, negative - false_positives
        return padded[RULES[target.kind](confusion, target.value)]

    point = float(chosen(np.ones((1, len(labels))))[0])
    drawn = np.concatenate([chosen(counts) for counts in bootstrap_counts(len(labels), samples, seed)])
    return percentile_interval(point, drawn, UNREACHABLE)


def operating_point(labels: ArrayLike, probabilities: ArrayLike, threshold: float) -> dict[str, Any]:
    """What a threshold does on rows: shares with Wilson intervals, and the counts behind them.

    Args:
        labels, probabilities: Shape `(rows,)`.
        threshold (`float`): A row is flagged where `probability >= threshold`.
    """
    labels, probabilities = check_labels(labels, probabilities), check_probabilities(probabilities)
    flagged = probabilities >= threshold
    true_positives = int((flagged & (labels == 1)).sum())
    false_positives = int((flagged & (labels == 0)).sum())
    false_negatives = int((~flagged & (labels == 1)).sum())
    true_negatives = len(labels) - true_positives - false_positives - false_negatives
    return {
        "sensitivity": share(true_positives, true_positives + false_negatives, "positive rows"),
        "specificity": share(true_negatives, true_negatives + false_positives, "negative rows"),
        "ppv": share(true_positives, true_positives + false_positives, "flagged rows"),
        "npv": share(true_negatives, true_negatives + false_negatives, "unflagged rows"),
        "flagged": share(true_positives + false_positives, len(labels), "rows"),
        "counts": {"tp": true_positives, "fp": false_positives, "fn": false_negatives, "tn": true_negatives},
    }


def threshold_sheet(
    validation: tuple[ArrayLike, ArrayLike] | None,
    reported: tuple[ArrayLike, ArrayLike],
    stored: float,
    targets: list[Target],
    samples: int = SAMPLES,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One entry a threshold: the stored one, 0.5, and one for each target.

    Args:
        validation (`tuple`, *optional*): Labels and probabilities that thresholds are fitted on; without them, targets
            are undefined: they are never fitted on the rows that are reported.
        reported (`tuple`): Labels and probabilities of the rows that operating points are reported on.
        stored (`float`): The model's own threshold.
        targets (`list[Target]`): What else to find thresholds for.
        samples, seed (`int`): Of the bootstrap.

    Returns:
        `list[dict]`: `target` (`kind`, `value`), `threshold` (`value`, `low`, `high` or a `reason`) and `on_reported`,
        see [`operating_point`]. A cost ratio r has also `if_calibrated`: 1 / (1 + r), the best threshold of
        perfectly calibrated probabilities (Elkan, 2001), and `cost_per_row` in false alarms.
    """
    sheet = []
    for name, threshold in (("stored", stored), ("half", 0.5)):
        sheet.append(
            {
                "target": {"kind": name, "value": None},
                "threshold": {"value": threshold, "low": None, "high": None},
                "on_reported": operating_point(*reported, threshold),
            }
        )
    for target in targets:
        entry: dict[str, Any] = {"target": {"kind": target.kind, "value": target.value}, "on_reported": None}
        if validation is None:
            entry["threshold"] = undefined("no validation rows to fit it on")
        else:
            entry["threshold"] = fit_threshold(*validation, target, samples, seed)
        if entry["threshold"]["value"] is not None:
            entry["on_reported"] = operating_point(*reported, entry["threshold"]["value"])
        if target.kind == "cost_ratio":
            entry["if_calibrated"] = 1 / (1 + target.value)
            if entry["on_reported"]:
                counts = entry["on_reported"]["counts"]
                entry["cost_per_row"] = (target.value * counts["fn"] + counts["fp"]) / len(reported[0])
        sheet.append(entry)
    return sheet
