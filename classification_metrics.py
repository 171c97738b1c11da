"""How good, and how well calibrated, the probabilities of a binary question are."""

import math

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import average_precision_score, brier_score_loss, f1_score, log_loss, roc_auc_score

ECE_BINS = 15
# Those that a training logs, a run prints and a card shows.
HEADLINE_METRICS = ("auroc", "average_precision", "f1", "accuracy", "brier", "ece")
MIN_ROWS_PER_BIN = 10
# The resolution of float32: a probability can't be told from 0 or 1 beyond it.
LOG_LOSS_CLIP = 1e-7


def classification_metrics(labels: ArrayLike, probabilities: ArrayLike, threshold: float = 0.5) -> dict[str, float]:
    """Scores probabilities of the positive class against labels.

    Args:
        labels: Shape `(rows,)`, each 0 or 1 (or bool).
        probabilities: Shape `(rows,)`, the probability of label 1, in [0, 1].
        threshold (`float`, *optional*, defaults to 0.5): A row is predicted positive where
            `probability >= threshold`. Used by `f1`, `accuracy` and `balanced_accuracy` alone.

    Returns:
        `dict[str, float]`:

        - `auroc`, `average_precision`, `balanced_accuracy` (mean of the two classes' recalls): nan where only one
          class is present, since they compare the classes. `atomic_io.write_json` writes nan as `null`.
        - `f1` of the positive class (nan where there is neither a positive row nor a positive prediction), `accuracy`.
        - `brier` (mean squared error of the probability), `ece` (see [`expected_calibration_error`]), `log_loss` in
          nats, of probabilities clipped to [1e-7, 1 - 1e-7].
        - `rows` and `positive` (the number of rows of label 1), as `int`; `threshold`.

    Raises:
        ValueError: No rows; shapes that differ or aren't 1-D; a label other than 0 and 1; a probability that is nan or
            outside [0, 1]; a threshold that is nan.
    """
    labels, probabilities = check_labels(labels, probabilities), check_probabilities(probabilities)
    if math.isnan(threshold):
        raise ValueError("`threshold` must be a number, got nan.")
    predictions = (probabilities >= threshold).astype(int)
    positive = int(labels.sum())
    both_classes = 0 < positive < len(labels)
    recalls = [float((predictions[labels == label] == label).mean()) for label in (0, 1)] if both_classes else []
    return {
        "auroc": float(roc_auc_score(labels, probabilities)) if both_classes else math.nan,
        "average_precision": float(average_precision_score(labels, probabilities)) if both_classes else math.nan,
        "f1": float(f1_score(labels, predictions, zero_division=math.nan)),
        "accuracy": float((predictions == labels).mean()),
        "balanced_accuracy": sum(recalls) / 2 if both_classes else math.nan,
        "brier": float(brier_score_loss(labels, probabilities, pos_label=1)),
        "ece": expected_calibration_error(labels, probabilities),
        "log_loss": float(log_loss(labels, probabilities.clip(LOG_LOSS_CLIP, 1 - LOG_LOSS_CLIP), labels=[0, 1])),
        "rows": len(labels),
        "positive": positive,
        "threshold": float(threshold),
    }


def expected_calibration_error(labels: ArrayLike, probabilities: ArrayLike, bins: int = ECE_BINS) -> float:
    """Expected calibration error of the positive class's probability, over bins of equal mass.

    `sum over bins of (rows of the bin / rows) * |share of label 1 - mean probability|` (Naeini et al., 2015,
    "Obtaining Well Calibrated Probabilities Using Bayesian Binning"; equal mass as in Nixon et al., 2019, "Measuring
    Calibration in Deep Learning").

    **Binning.** There are `min(bins, rows // 10)` bins, and at least one, so that a bin holds about 10 rows or more:
    with fewer, chance alone gives a large error. Rows are ranked by probability; a row with mid-rank `r` (0.5 for the
    lowest of `n` rows, `n - 0.5` for the highest, the mean of their mid-ranks for rows of equal probability) goes to
    bin `floor(bins * r / n)`. Equal probabilities thus always share a bin, and the order of the rows plays no part.
    Ties can leave a bin empty; it then counts nothing.

    Args:
        labels: Shape `(rows,)`, each 0 or 1.
        probabilities: Shape `(rows,)`, the probability of label 1, in [0, 1].
        bins (`int`, *optional*, defaults to 15): Most bins to use.

    Returns:
        `float`: In [0, 1]; 0 is perfect.

    Raises:
        ValueError: As [`classification_metrics`], or `bins` below 1.
    """
    points = reliability_bins(labels, probabilities, bins)
    return sum(abs(positive - rows * mean) for mean, positive, rows in points) / len(labels)


def reliability_bins(
    labels: ArrayLike, probabilities: ArrayLike, bins: int = ECE_BINS
) -> list[tuple[float, int, int]]:
    """The points of a reliability diagram, over the bins of [`expected_calibration_error`] that hold a row.

    Args:
        labels, probabilities, bins: As for [`expected_calibration_error`].

    Returns:
        `list[tuple[float, int, int]]`: Mean probability, rows of label 1, and rows; by rising probability.

    Raises:
        ValueError: As [`expected_calibration_error`].
    """
    labels, probabilities = check_labels(labels, probabilities), check_probabilities(probabilities)
    if bins < 1:
        raise ValueError(f"`bins` must be 1 or more, got {bins}.")
    rows = len(labels)
    bins = max(1, min(bins, rows // MIN_ROWS_PER_BIN))
    _, group, sizes = np.unique(probabilities, return_inverse=True, return_counts=True)
    # Twice the mid-rank is a whole number, so that no rounding moves a row into the next bin.
    doubled_mid_ranks = 2 * np.cumsum(sizes) - sizes
    row_bins = (bins * doubled_mid_ranks // (2 * rows))[group]
    members = [row_bins == number for number in np.unique(row_bins)]
    return [(float(probabilities[of_bin].mean()), int(labels[of_bin].sum()), int(of_bin.sum())) for of_bin in members]


def check_labels(labels: ArrayLike, scores: ArrayLike) -> np.ndarray:
    """The labels as integers, after checking that they are 0 or 1 and as many as the scores.

    Args:
        labels: Shape `(rows,)`, each 0 or 1.
        scores: Shape `(rows,)`, one number a row.

    Returns:
        `np.ndarray`: int64, shape `(rows,)`.

    Raises:
        ValueError: No rows; shapes that differ or aren't 1-D; a label other than 0 and 1.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(
            f"One label and one score a row are needed, as 1-D arrays; got shapes {labels.shape} and {scores.shape}."
        )
    if not len(labels):
        raise ValueError("There are no rows: at least one label with its score is needed.")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"Labels must be 0 or 1; found {sorted(set(labels[~np.isin(labels, (0, 1))].tolist()))[:5]}.")
    return labels.astype(np.int64)


def check_probabilities(probabilities: ArrayLike) -> np.ndarray:
    """The probabilities as float64; raises `ValueError` where one is nan or outside [0, 1]."""
    probabilities = np.asarray(probabilities, dtype=np.float64)
    wrong = probabilities[~((probabilities >= 0) & (probabilities <= 1))]
    if wrong.size:
        raise ValueError(f"Probabilities must lie in [0, 1]; found {wrong[:5].tolist()} ({wrong.size} in all).")
    return probabilities
