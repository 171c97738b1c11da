"""Metrics of many bootstrap samples at once: a sample is a row of counts, how often each row of the data was drawn."""

from collections.abc import Callable, Iterator

import numpy as np

from clsgen.classification_metrics import ECE_BINS, LOG_LOSS_CLIP, MIN_ROWS_PER_BIN

MAX_COUNTS = 4_000_000  # of one chunk: 32 MB as float64

Statistics = Callable[[np.ndarray], dict[str, np.ndarray]]


def bootstrap_counts(rows: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Bootstrap samples of `rows` rows, in chunks that fit the memory.

    Rows are drawn plainly, not by label: how many rows of each label a data set holds is itself a matter of chance,
    and F1, predictive values, Brier score and calibration error depend on it.

    Args:
        rows (`int`): Rows of the data, and of each sample.
        samples (`int`): How many samples.
        seed (`int`): The same seed draws the same samples, whatever is computed of them: paired comparisons need that.

    Returns:
        Chunks of shape `(chunk, rows)`, float64: how often each row was drawn.
    """
    random = np.random.default_rng(seed)
    chunk = max(1, MAX_COUNTS // rows)
    for first in range(0, samples, chunk):
        size = min(chunk, samples - first)
        yield random.multinomial(rows, np.full(rows, 1 / rows), size=size).astype(np.float64)


def leave_one_out_counts(rows: int) -> Iterator[np.ndarray]:
    """The jackknife's samples, each without one row, in chunks as of [`bootstrap_counts`]."""
    chunk = max(1, MAX_COUNTS // rows)
    for first in range(0, rows, chunk):
        left_out = np.arange(first, min(first + chunk, rows))
        counts = np.ones((len(left_out), rows))
        counts[np.arange(len(left_out)), left_out] = 0
        yield counts


def over_chunks(chunks: Iterator[np.ndarray], statistics: Statistics) -> dict[str, np.ndarray]:
    """`statistics` of every chunk of counts, joined along the samples."""
    parts = [statistics(counts) for counts in chunks]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class RankedRows:
    """Rows in the order of their probability, with tied ones as groups: what all metrics of samples start from.

    Args:
        labels (`np.ndarray`): Shape `(rows,)`, each 0 or 1.
        probabilities (`np.ndarray`): Shape `(rows,)`, of label 1.
    """

    def __init__(self, labels: np.ndarray, probabilities: np.ndarray):
        self.order = np.argsort(probabilities, kind="stable")
        self.labels = labels[self.order].astype(np.float64)
        self.probabilities = probabilities[self.order].astype(np.float64)
        self.starts = np.flatnonzero(np.r_[True, np.diff(self.probabilities) > 0])
        self.values = self.probabilities[self.starts]  # (groups,), rising

    def groups(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Drawn rows of label 1 and of label 0 at each distinct probability, each of shape `(samples, groups)`."""
        counts = counts[:, self.order]
        total = np.add.reduceat(counts, self.starts, axis=1)
        positive = np.add.reduceat(counts * self.labels, self.starts, axis=1)
        return positive, total - positive

    def at_or_above(self, counts: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """True and false positives at each threshold, each of shape `(samples, thresholds)`."""
        return tuple(_at_or_above(drawn, self.values, thresholds) for drawn in self.groups(counts))


def _at_or_above(drawn: np.ndarray, values: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    above = np.cumsum(drawn[:, ::-1], axis=1)[:, ::-1]
    above = np.concatenate([above, np.zeros((len(drawn), 1))], axis=1)
    return above[:, np.searchsorted(values, thresholds, side="left")]


def metric_statistics(labels: np.ndarray, probabilities: np.ndarray, threshold: float) -> Statistics:
    """The metrics of the report as a function of counts; nan where a sample leaves one undefined.

    They are what scikit-learn computes with the counts as `sample_weight`; the calibration error is that of
    [`classification_metrics.expected_calibration_error`] on the drawn rows.

    Args:
        labels, probabilities (`np.ndarray`): Shape `(rows,)`.
        threshold (`float`): The stored one; F1 is also given at 0.5.
    """
    ranked = RankedRows(labels, probabilities)
    clipped = probabilities.clip(LOG_LOSS_CLIP, 1 - LOG_LOSS_CLIP)
    squared_errors = (probabilities - labels) ** 2
    log_losses = -np.log(np.where(labels == 1, clipped, 1 - clipped))

    def statistics(counts: np.ndarray) -> dict[str, np.ndarray]:
        positive, negative = ranked.groups(counts)
        rows = counts.sum(axis=1)
        true_positives, false_positives = ranked.at_or_above(counts, np.array([threshold, 0.5]))
        with np.errstate(divide="ignore", invalid="ignore"):
            return {
                "auroc": _auroc(positive, negative),
                "average_precision": _average_precision(positive, negative),
                **_decision_metrics(true_positives[:, 0], false_positives[:, 0], positive.sum(1), negative.sum(1)),
                "f1_at_half": _f1(true_positives[:, 1], false_positives[:, 1], positive.sum(1)),
                "brier": counts @ squared_errors / rows,
                "ece": _calibration_error(positive, negative, ranked.values),
                "log_loss": counts @ log_losses / rows,
            }

    return statistics


def _auroc(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Share of pairs in the right order, ties a half (the Mann-Whitney statistic)."""
    below = np.cumsum(negative, axis=1) - negative / 2
    return (positive * below).sum(axis=1) / (positive.sum(axis=1) * negative.sum(axis=1))


def _average_precision(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    found = positive[:, ::-1]
    true_positives = np.cumsum(found, axis=1)
    flagged = np.cumsum((positive + negative)[:, ::-1], axis=1)
    precision = np.divide(true_positives, flagged, out=np.zeros_like(flagged), where=flagged > 0)
    average = (found * precision).sum(axis=1) / positive.sum(axis=1)
    return np.where(negative.sum(axis=1) > 0, average, np.nan)


def _f1(true_positives: np.ndarray, false_positives: np.ndarray, positive: np.ndarray) -> np.ndarray:
    return 2 * true_positives / (true_positives + false_positives + positive)


def _decision_metrics(
    true_positives: np.ndarray, false_positives: np.ndarray, positive: np.ndarray, negative: np.ndarray
) -> dict[str, np.ndarray]:
    true_negatives, false_negatives = negative - false_positives, positive - true_positives
    flagged, passed = true_positives + false_positives, true_negatives + false_negatives
    covariance = true_positives * true_negatives - false_positives * false_negatives
    return {
        "f1": _f1(true_positives, false_positives, positive),
        "accuracy": (true_positives + true_negatives) / (positive + negative),
        "balanced_accuracy": (true_positives / positive + true_negatives / negative) / 2,
        "mcc": covariance / np.sqrt(flagged * passed * positive * negative),
    }


def _calibration_error(positive: np.ndarray, negative: np.ndarray, values: np.ndarray) -> np.ndarray:
    sizes = positive + negative
    rows = sizes.sum(axis=1, keepdims=True)
    bins = max(1, min(ECE_BINS, int(rows[0, 0]) // MIN_ROWS_PER_BIN))
    of_group = bins * (2 * np.cumsum(sizes, axis=1) - sizes) // (2 * rows)  # whole numbers: no rounding moves a row
    gaps = positive - values * sizes
    error = sum(np.abs(np.where(of_group == bin_index, gaps, 0).sum(axis=1)) for bin_index in range(bins))
    return error / rows[:, 0]


def perfectly_calibrated_errors(probabilities: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Calibration errors of labels that are drawn from the probabilities themselves: what chance alone gives.

    Returns an array of shape `(samples,)`.

    Args:
        probabilities (`np.ndarray`): Shape `(rows,)`.
        samples, seed (`int`): As in [`bootstrap_counts`].
    """
    ranked = RankedRows(np.zeros(len(probabilities)), probabilities)
    random = np.random.default_rng(seed)
    sizes = np.diff(np.r_[ranked.starts, len(probabilities)])[None].astype(np.float64)
    errors = []
    chunk = max(1, MAX_COUNTS // len(probabilities))
    for first in range(0, samples, chunk):
        positive = random.binomial(sizes.astype(int), ranked.values, (min(chunk, samples - first), len(ranked.values)))
        errors.append(_calibration_error(positive, sizes - positive, ranked.values))
    return np.concatenate(errors)
