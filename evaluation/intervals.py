"""Metrics with their 95% bootstrap intervals; what is undefined says why."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri
from scipy.stats import binomtest

from clsgen.classification_metrics import check_labels, check_probabilities
from clsgen.evaluation.resampling import (
    Statistics,
    bootstrap_counts,
    leave_one_out_counts,
    metric_statistics,
    over_chunks,
    perfectly_calibrated_errors,
)

CONFIDENCE = 0.95
TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
SAMPLES = 2000
MAX_UNDEFINED_SHARE = 0.05
MAX_JACKKNIFE_ROWS = 3000  # with more rows the correction for skewness is nothing

Estimate = dict[str, Any]


def undefined(reason: str) -> Estimate:
    """An estimate that has no value, and why."""
    return {"value": None, "low": None, "high": None, "reason": reason}


def metrics_with_intervals(
    labels: ArrayLike, probabilities: ArrayLike, threshold: float, samples: int = SAMPLES, seed: int = 0
) -> dict[str, Estimate]:
    """The metrics of the report, each with a 95% interval.

    Intervals are bias-corrected and accelerated (BCa; Efron, 1987, "Better Bootstrap Confidence Intervals") over
    `samples` draws of the rows, not stratified by label. The calibration error is the exception: it can't be below 0,
    and of drawn rows it is larger than of the rows themselves, so that the usual intervals don't even hold the truth
    of a perfectly calibrated model; see [`error_interval`].

    Args:
        labels: Shape `(rows,)`, each 0 or 1.
        probabilities: Shape `(rows,)`, of label 1, in [0, 1].
        threshold (`float`): A row is called positive where `probability >= threshold`.
        samples (`int`, *optional*, defaults to 2000): Bootstrap samples.
        seed (`int`, *optional*, defaults to 0): Of the draws.

    Returns:
        `dict` of `auroc`, `average_precision`, `f1`, `accuracy`, `balanced_accuracy`, `mcc` (at `threshold`),
        `f1_at_half`, `brier`, `ece`, `log_loss`, each a `dict` of `value`, `low`, `high`; where one of these is None,
        `reason` says why. `ece` has also `by_chance`: the mean error of a perfectly calibrated model with these
        probabilities.

    Raises:
        ValueError: as [`classification_metrics.classification_metrics`].
    """
    labels, probabilities = check_labels(labels, probabilities), check_probabilities(probabilities)
    statistics = metric_statistics(labels, probabilities, threshold)
    points, drawn, left_out = _resampled(statistics, len(labels), samples, seed)
    estimates = {
        name: interval(points[name], drawn[name], left_out.get(name), _reason(name, labels))
        for name in points
        if name != "ece"
    }
    chance = perfectly_calibrated_errors(probabilities, samples, seed)
    estimates["ece"] = {**error_interval(points["ece"], drawn["ece"], chance), "by_chance": float(chance.mean())}
    return estimates


def _resampled(
    statistics: Statistics, rows: int, samples: int, seed: int
) -> tuple[dict[str, float], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Statistics of the rows as they are, of bootstrap samples, and (where they are not too many) without each row."""
    points = {name: float(value[0]) for name, value in statistics(np.ones((1, rows))).items()}
    drawn = over_chunks(bootstrap_counts(rows, samples, seed), statistics)
    few = 2 <= rows <= MAX_JACKKNIFE_ROWS
    return points, drawn, over_chunks(leave_one_out_counts(rows), statistics) if few else {}


def _reason(name: str, labels: np.ndarray) -> str:
    if name in ("auroc", "average_precision", "balanced_accuracy") and labels.min() == labels.max():
        return f"all {len(labels)} rows have label {labels[0]}"
    return "0 / 0: no row, or no prediction, of a class that it is a share of"


def interval(point: float, drawn: np.ndarray, left_out: np.ndarray | None, reason: str) -> Estimate:
    """The BCa interval of a statistic.

    Args:
        point (`float`): Of the data; nan where it is undefined.
        drawn (`np.ndarray`): Shape `(samples,)`, of bootstrap samples; nan where undefined.
        left_out (`np.ndarray`, *optional*): Shape `(rows,)`, of the data without each row; without them the interval
            is bias-corrected, but not accelerated.
        reason (`str`): Why `point` would be undefined.
    """
    if np.isnan(point):
        return undefined(reason)
    problem = _interval_problem(drawn)
    if problem:
        return {**undefined(problem), "value": float(point)}
    drawn = drawn[~np.isnan(drawn)]
    share_below = ((drawn < point).mean() + (drawn <= point).mean()) / 2  # ties with the point count a half
    bias = ndtri(np.clip(share_below, 1 / len(drawn), 1 - 1 / len(drawn)))
    skewness = 0.0 if left_out is None else _acceleration(left_out)
    normal = bias + ndtri(TAILS)
    low, high = np.quantile(drawn, ndtr(bias + normal / (1 - skewness * normal)))
    return {"value": float(point), "low": float(low), "high": float(high)}


def _interval_problem(drawn: np.ndarray) -> str | None:
    missing = np.isnan(drawn).mean()
    if missing > MAX_UNDEFINED_SHARE:
        return f"no interval: undefined in {missing:.0%} of the bootstrap samples"
    if np.nanmax(drawn) - np.nanmin(drawn) < 1e-12:
        return "no interval: the same in every bootstrap sample"
    return None


def _acceleration(left_out: np.ndarray) -> float:
    deviations = np.nanmean(left_out) - left_out[~np.isnan(left_out)]
    spread = (deviations**2).sum() ** 1.5
    return float((deviations**3).sum() / (6 * spread)) if spread > 0 else 0.0


def error_interval(point: float, drawn: np.ndarray, chance: np.ndarray) -> Estimate:
    """The interval of a calibration error: approximate, since the error has a kink at 0.

    It holds the basic bootstrap interval (reflected about the estimate, which undoes the bias of drawn rows). That
    alone is too narrow for a model that is not perfectly calibrated, so it also goes as far up as the estimate, and as
    far down as the estimate less its bias, with a normal margin of the draws' standard deviation. It goes down to 0
    wherever a perfectly calibrated model would show an error as large in 2.5% of draws or more (consistency
    resampling: Bröcker and Smith, 2007, "Increasing the Reliability of Reliability Diagrams").

    Args:
        point (`float`): Of the data.
        drawn (`np.ndarray`): Shape `(samples,)`, of bootstrap samples.
        chance (`np.ndarray`): Shape `(samples,)`, of a perfectly calibrated model.
    """
    problem = _interval_problem(drawn)
    if problem:
        return {**undefined(problem), "value": float(point)}
    low, high = 2 * point - np.quantile(drawn, TAILS[::-1])
    margin = ndtri(TAILS[1]) * drawn.std()
    low, high = min(low, 2 * point - drawn.mean() - margin), max(high, point + margin)
    if (chance >= point).mean() >= TAILS[0]:
        low = 0.0
    return {"value": float(point), "low": max(0.0, float(low)), "high": float(high)}


def percentile_interval(point: float, drawn: np.ndarray, reason: str) -> Estimate:
    """The percentile interval of a statistic, for what has no smooth correction: thresholds, differences, counts.

    Args:
        point, drawn, reason: As in [`interval`].
    """
    if np.isnan(point):
        return undefined(reason)
    if np.isnan(drawn).mean() > MAX_UNDEFINED_SHARE:
        return {**undefined(_interval_problem(drawn)), "value": float(point)}
    low, high = np.nanquantile(drawn, TAILS)
    return {"value": float(point), "low": float(low), "high": float(high)}


def share(part: int, whole: int, of_what: str) -> Estimate:
    """A share of rows with its Wilson interval (Wilson, 1927), which holds at 0 and 1 and for few rows too.

    Args:
        part, whole (`int`): Rows.
        of_what (`str`): Names the whole, for the reason where there is none.
    """
    if not whole:
        return undefined(f"no {of_what}")
    low, high = binomtest(part, whole).proportion_ci(CONFIDENCE, method="wilson")
    return {"value": part / whole, "low": float(low), "high": float(high)}


def agreement_with_intervals(
    probabilities: ArrayLike, predicted: ArrayLike, judged: ArrayLike, samples: int = SAMPLES, seed: int = 0
) -> dict[str, Estimate]:
    """How far numbers agree with the labels that a judge reads in the words, with 95% intervals.

    Args:
        probabilities, predicted: Shape `(rows,)`, of label 1, and the label given.
        judged: Shape `(rows,)`, the judge's label.
        samples, seed (`int`): Of the bootstrap.

    Returns:
        `dict` of `auroc_alignment`, `kappa` (Cohen's) and `contradiction_rate`, as [`metrics_with_intervals`] gives
        them.
    """
    if not len(judged):
        reason = "no explanation was judged"
        return {name: undefined(reason) for name in ("auroc_alignment", "kappa", "contradiction_rate")}
    judged, predicted = check_labels(judged, probabilities), check_labels(predicted, probabilities)
    of_ranks = metric_statistics(judged, check_probabilities(probabilities), 0.5)
    agree = (judged == predicted).astype(np.float64)

    def statistics(counts: np.ndarray) -> dict[str, np.ndarray]:
        rows = counts.sum(axis=1)
        agreement, said, read = counts @ agree / rows, counts @ predicted / rows, counts @ judged / rows
        by_chance = said * read + (1 - said) * (1 - read)
        one_label = (said % 1 == 0) | (read % 1 == 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            kappa = np.where(one_label, np.nan, (agreement - by_chance) / (1 - by_chance))
        return {"auroc_alignment": of_ranks(counts)["auroc"], "kappa": kappa}

    points, drawn, left_out = _resampled(statistics, len(judged), samples, seed)
    reasons = {
        "auroc_alignment": "the judge found one label only",
        "kappa": "one label only was predicted, or found by the judge",
    }
    estimates = {name: interval(points[name], drawn[name], left_out.get(name), reasons[name]) for name in points}
    return {**estimates, "contradiction_rate": share(int((agree == 0).sum()), len(judged), "judged explanations")}
