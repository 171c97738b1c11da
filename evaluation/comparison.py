"""Two models on the same rows: is the difference more than chance?"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest, norm, rankdata

from clsgen.classification_metrics import check_labels, check_probabilities
from clsgen.evaluation.intervals import SAMPLES, TAILS, percentile_interval
from clsgen.evaluation.resampling import bootstrap_counts, metric_statistics


def compare(
    labels: ArrayLike,
    ours: ArrayLike,
    theirs: ArrayLike,
    our_decisions: ArrayLike,
    their_decisions: ArrayLike,
    samples: int = SAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Paired tests between two models.

    Args:
        labels: Shape `(rows,)`, each 0 or 1.
        ours, theirs: Shape `(rows,)`, probabilities of label 1 for the same rows.
        our_decisions, their_decisions: Shape `(rows,)`, each 0 or 1.
        samples, seed (`int`): Of the paired bootstrap.

    Returns:
        `dict`: `delong` (see [`delong`]), `mcnemar` (see [`mcnemar`]), and `differences`: ours less theirs for each
        threshold-free metric, with a percentile interval of the paired bootstrap (the same draws for both).
    """
    labels = check_labels(labels, ours)
    ours, theirs = check_probabilities(ours), check_probabilities(theirs)
    check_labels(labels, theirs)
    # Not the calibration error: chance raises it, and by how much differs between the models.
    names = ("auroc", "average_precision", "brier", "log_loss")
    mine, other = metric_statistics(labels, ours, 0.5), metric_statistics(labels, theirs, 0.5)

    def differences(counts: np.ndarray) -> dict[str, np.ndarray]:
        first, second = mine(counts), other(counts)
        return {name: first[name] - second[name] for name in names}

    points = differences(np.ones((1, len(labels))))
    parts = [differences(counts) for counts in bootstrap_counts(len(labels), samples, seed)]
    drawn = {name: np.concatenate([part[name] for part in parts]) for name in names}
    reason = "all rows have the same label"
    return {
        "rows": len(labels),
        "delong": delong(labels, ours, theirs),
        "mcnemar": mcnemar(labels, our_decisions, their_decisions),
        "differences": {name: percentile_interval(float(points[name][0]), drawn[name], reason) for name in names},
    }


def delong(labels: ArrayLike, ours: ArrayLike, theirs: ArrayLike) -> dict[str, Any]:
    """DeLong's test of two AUROCs on the same rows.

    DeLong, DeLong and Clarke-Pearson, 1988, "Comparing the Areas under Two or More Correlated Receiver Operating
    Characteristic Curves: A Nonparametric Approach"; computed from ranks (Sun and Xu, 2014).

    Args:
        labels: Shape `(rows,)`.
        ours, theirs: Shape `(rows,)`, or `(runs, rows)` for a system's mean AUROC over its runs: its rows' shares are
            means then, and the rest is the same.

    Returns:
        `dict`: `difference` (ours less theirs), `low`, `high` (95%), `p_value` (two-sided). Where there is no
        test, `p_value` is None and `reason` says why.
    """
    systems = [np.stack([check_probabilities(run) for run in np.atleast_2d(runs)]) for runs in (ours, theirs)]
    labels = check_labels(labels, systems[0][0])
    if min((labels == label).sum() for label in (0, 1)) < 2:
        return _untested("fewer than two rows of a label")
    shares = [_rightly_ranked(labels, runs) for runs in systems]
    of_positive, of_negative = (np.stack(parts) for parts in zip(*shares, strict=True))
    covariance = np.cov(of_positive) / of_positive.shape[1] + np.cov(of_negative) / of_negative.shape[1]
    areas = of_positive.mean(axis=1)
    difference = float(areas[0] - areas[1])
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    if variance <= 1e-15:
        alike = "the two models rank the rows alike"
        return _untested("no row varies in how each model ranks it" if difference else alike, difference)
    error = variance**0.5
    low, high = difference + norm.ppf(TAILS) * error
    p_value = float(2 * norm.sf(abs(difference) / error))
    return {"difference": difference, "low": float(low), "high": float(high), "p_value": p_value}


def _rightly_ranked(labels: np.ndarray, runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The share of the other label that each row of label 1, and of label 0, is rightly ranked against: over runs."""
    positive, negative = runs[:, labels == 1], runs[:, labels == 0]
    count = positive.shape[1]
    ranks = rankdata(np.concatenate([positive, negative], axis=1), axis=1)
    of_positive = (ranks[:, :count] - rankdata(positive, axis=1)) / negative.shape[1]
    of_negative = 1 - (ranks[:, count:] - rankdata(negative, axis=1)) / count
    return of_positive.mean(axis=0), of_negative.mean(axis=0)


def _untested(reason: str, difference: float | None = None) -> dict[str, Any]:
    return {"difference": difference, "low": None, "high": None, "p_value": None, "reason": reason}


def mcnemar(labels: ArrayLike, our_decisions: ArrayLike, their_decisions: ArrayLike) -> dict[str, Any]:
    """McNemar's exact test: of the rows that one model alone gets right, is either model's share more than half?

    Args:
        labels, our_decisions, their_decisions: Shape `(rows,)`, each 0 or 1.

    Returns:
        `dict`: `only_ours_right`, `only_theirs_right` (rows), `p_value` (two-sided, exact binomial); None with a
        `reason` where both are right on the same rows.
    """
    labels = check_labels(labels, our_decisions)
    ours = check_labels(our_decisions, labels) == labels
    theirs = check_labels(their_decisions, labels) == labels
    only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    result = {"only_ours_right": only_ours, "only_theirs_right": only_theirs, "p_value": None}
    if not only_ours + only_theirs:
        return {**result, "reason": "both models are right on the same rows"}
    return {**result, "p_value": float(binomtest(only_ours, only_ours + only_theirs).pvalue)}
