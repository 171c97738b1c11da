"""Probabilities of a binary question, and the words beside them: an `evaluate` module that needs nothing else."""

import math

import datasets
import evaluate
import numpy as np
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    cohen_kappa_score,
    f1_score,
    log_loss,
    matthews_corrcoef,
    roc_auc_score,
)

_DESCRIPTION = """
Two configurations. `classification` (the default): how good, and how well calibrated, probabilities of label 1 are.
`alignment`: whether a model's probability agrees with the label that a judge reads out of its explanation. An
undefined value is nan, and `undefined` says why.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: probabilities of label 1, in [0, 1].
    references: labels, 0 or 1; in the configuration `alignment`, those that the explanations were judged to argue for.
    threshold: a row is predicted positive where `probability >= threshold`; 0.5 by default.
    bins: most bins of the expected calibration error; 15 by default.
Returns:
    classification: auroc, average_precision, f1, accuracy, balanced_accuracy, mcc, brier, ece, log_loss, rows,
        positive, threshold.
    alignment: auroc_alignment, kappa (Cohen's), agreement, contradiction_rate, rows, threshold.
    undefined: for each value that is nan, the reason.
Examples:
    >>> import evaluate
    >>> metric = evaluate.load("metrics/clsgen")
    >>> result = metric.compute(predictions=[0.2, 0.8, 0.6, 0.4], references=[0, 1, 0, 1])
    >>> result["auroc"], result["accuracy"]
    (0.75, 0.5)
    >>> alignment = evaluate.load("metrics/clsgen", "alignment")
    >>> alignment.compute(predictions=[0.2, 0.8, 0.6, 0.4], references=[0, 1, 0, 1])["contradiction_rate"]
    0.5
"""

_CITATION = """
@misc{clsgen, title={CLSGen: A Dual-Head Fine-Tuning Framework for Joint Probabilistic Classification and Verbalized
Explanation}, eprint={2604.11801}, archivePrefix={arXiv}}
"""

CONFIGURATIONS = ("classification", "alignment")
# With fewer rows in a bin, chance alone gives a large calibration error.
MIN_ROWS_PER_BIN = 10
# The resolution of float32: a probability can't be told from 0 or 1 beyond it.
LOG_LOSS_CLIP = 1e-7


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Clsgen(evaluate.Metric):
    """See `_DESCRIPTION`."""

    def _info(self):
        if self.config_name not in (*CONFIGURATIONS, "default", None):
            raise ValueError(f"The configuration is one of {CONFIGURATIONS}, got {self.config_name!r}.")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
            reference_urls=["https://arxiv.org/abs/2604.11801"],
        )

    def _compute(self, predictions, references, threshold=0.5, bins=15):
        probabilities, labels = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
        _check(probabilities, labels, threshold, bins)
        labels = labels.astype(np.int64)
        if self.config_name == "alignment":
            return _alignment(probabilities, labels, threshold)
        return _classification(probabilities, labels, threshold, bins)


def _check(probabilities, labels, threshold, bins):
    if not len(labels):
        raise ValueError("There are no rows: at least one label with its probability is needed.")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"Labels must be 0 or 1; found {sorted(set(labels[~np.isin(labels, (0, 1))].tolist()))[:5]}.")
    wrong = probabilities[~((probabilities >= 0) & (probabilities <= 1))]
    if wrong.size:
        raise ValueError(f"Probabilities must lie in [0, 1]; found {wrong[:5].tolist()} ({wrong.size} in all).")
    if math.isnan(threshold):
        raise ValueError("`threshold` must be a number, got nan.")
    if bins < 1:
        raise ValueError(f"`bins` must be 1 or more, got {bins}.")


def _classification(probabilities, labels, threshold, bins):
    predictions = (probabilities >= threshold).astype(int)
    found = {
        "auroc": math.nan,
        "average_precision": math.nan,
        "f1": float(f1_score(labels, predictions, zero_division=0.0)),
        "accuracy": float((predictions == labels).mean()),
        "balanced_accuracy": math.nan,
        "mcc": math.nan,
        "brier": float(brier_score_loss(labels, probabilities, pos_label=1)),
        "ece": expected_calibration_error(labels, probabilities, bins),
        "log_loss": float(log_loss(labels, probabilities.clip(LOG_LOSS_CLIP, 1 - LOG_LOSS_CLIP), labels=[0, 1])),
        "rows": len(labels),
        "positive": int(labels.sum()),
        "threshold": float(threshold),
        "undefined": {},
    }
    if len(set(labels.tolist())) == 1:
        reason = f"all references are {labels[0]}"
        found["undefined"] = dict.fromkeys(("auroc", "average_precision", "balanced_accuracy", "mcc"), reason)
        if not labels[0] and not predictions.any():
            found["f1"], found["undefined"]["f1"] = math.nan, "no row is positive, and none was predicted to be"
        return found
    found["auroc"] = float(roc_auc_score(labels, probabilities))
    found["average_precision"] = float(average_precision_score(labels, probabilities))
    found["balanced_accuracy"] = float(np.mean([(predictions[labels == c] == c).mean() for c in (0, 1)]))
    if len(set(predictions.tolist())) == 1:
        found["undefined"]["mcc"] = f"all rows are predicted to be {predictions[0]}"
    else:
        found["mcc"] = float(matthews_corrcoef(labels, predictions))
    return found


def _alignment(probabilities, judged, threshold):
    predicted = (probabilities >= threshold).astype(int)
    found, undefined = {"auroc_alignment": math.nan, "kappa": math.nan}, {}
    one_judged, one_predicted = len(set(judged.tolist())) == 1, len(set(predicted.tolist())) == 1
    if one_judged:
        undefined["auroc_alignment"] = f"all explanations were judged to argue for label {judged[0]}"
    else:
        found["auroc_alignment"] = float(roc_auc_score(judged, probabilities))
    if one_judged or one_predicted:
        undefined["kappa"] = f"only one label was {'judged' if one_judged else 'predicted'}"
    else:
        found["kappa"] = float(cohen_kappa_score(predicted, judged))
    agreement = float((predicted == judged).mean())
    return {
        **found,
        "agreement": agreement,
        "contradiction_rate": 1 - agreement,
        "rows": len(judged),
        "threshold": float(threshold),
        "undefined": undefined,
    }


def expected_calibration_error(labels, probabilities, bins=15):
    """Expected calibration error over bins of equal mass; equal probabilities always share a bin.

    There are `min(bins, rows // 10)` bins, and at least one. A row with mid-rank `r` among `n` goes to bin
    `floor(bins * r / n)`.
    """
    rows = len(labels)
    bins = max(1, min(bins, rows // MIN_ROWS_PER_BIN))
    _, group, sizes = np.unique(probabilities, return_inverse=True, return_counts=True)
    # Twice the mid-rank is a whole number, so that no rounding moves a row into the next bin.
    doubled_mid_ranks = 2 * np.cumsum(sizes) - sizes
    row_bins = (bins * doubled_mid_ranks // (2 * rows))[group]
    gaps = np.bincount(row_bins, weights=labels - probabilities, minlength=bins)
    return float(np.abs(gaps).sum() / rows)
