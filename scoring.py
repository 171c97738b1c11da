"""What a finished model's number is worth: calibration on the validation split, metrics of each split, their table."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset

from clsgen.calibration import (
    THRESHOLD_METHODS,
    calibrated_probabilities,
    choose_threshold,
    conformal_coverage,
    conformal_quantiles,
    fit_temperature_and_bias,
)
from clsgen.classification_metrics import HEADLINE_METRICS, classification_metrics
from clsgen.configuration_clsgen import ClsGenConfig
from clsgen.modeling_clsgen import ClsGenForCausalLMAndClassification
from clsgen.tasks import Task, class_counts, rows_digest
from clsgen.training_rows import hard_labels

logger = logging.getLogger(__name__)
# What [`calibrate_and_test`] tells of splits in a run's report.
SCORED = ("validation", "validation_uncalibrated", "test", "test_uncalibrated", "test_conformal", "test_rows_sha256")


@dataclass
class CalibrationArguments:
    """What the number is made of, and how a decision is made of it; all of it is fitted on the validation split."""

    lm_reading_weight: float | None = field(
        default=None, metadata={"help": "Weight of the LM's own reading of the verdict in the number, 0 to 1; the "
                                        "rest is the head's. Above 0, `classify` runs the whole model. Default: as "
                                        "the model has it, 0 in a new one."}
    )  # fmt: skip
    threshold_method: str | None = field(
        default=None, metadata={"help": "How to choose the threshold on the validation split. Default: as the model's "
                                        "was chosen, f1 in a new one.", "choices": list(THRESHOLD_METHODS)}
    )  # fmt: skip
    fixed_threshold: float | None = field(
        default=None, metadata={"help": "The threshold of `--threshold_method fixed`. Default: the model's, 0.5 in a "
                                        "new one."}
    )  # fmt: skip
    conformal_error_rate: float | None = field(
        default=None, metadata={"help": "Of the prediction sets that are fitted on the validation split: how often a "
                                        "row of either label may lose its own. Default: the model's, 0.1 in a new "
                                        "one."}
    )  # fmt: skip

    def __post_init__(self):
        # argparse checks flags alone, not a recipe's values.
        if self.threshold_method not in (None, *THRESHOLD_METHODS):
            raise ValueError(
                f"`--threshold_method` must be one of {THRESHOLD_METHODS}, got {self.threshold_method!r}."
            )
        if not 0 <= (self.fixed_threshold or 0) <= 1:
            raise ValueError(
                f"`--fixed_threshold` is a probability, between 0 and 1, got {self.fixed_threshold}: 0.5 for 50%."
            )
        if self.conformal_error_rate is not None and not 0 < self.conformal_error_rate < 1:
            raise ValueError(
                "`--conformal_error_rate` must lie between 0 and 1, both excluded, got "
                f"{self.conformal_error_rate}: 0.1 for 10%."
            )
        if not 0 <= (self.lm_reading_weight or 0) <= 1:
            raise ValueError(f"`--lm_reading_weight` must lie between 0 and 1, got {self.lm_reading_weight}.")


def before_and_after(name: str, logits: np.ndarray, labels: np.ndarray, config: ClsGenConfig) -> dict[str, Any]:
    """Metrics of a split with the config's calibration and threshold, and without either."""
    calibrated = calibrated_probabilities(logits, **config.calibration)
    return {
        name: classification_metrics(labels, calibrated, config.threshold),
        f"{name}_uncalibrated": classification_metrics(labels, calibrated_probabilities(logits, 1.0, 0.0), 0.5),
    }


def prediction_records(
    ids: list[str], labels: np.ndarray, logits: np.ndarray, probabilities: np.ndarray, threshold: float
) -> list[dict[str, Any]]:
    """What `test_predictions.json` holds, one record a row; `evaluate_clsgen.py --compare` reads it."""
    return [
        {
            "id": row_id, "label": int(label), "predicted": int(probability >= threshold),
            "probability": float(probability), "logit": float(logit),
        }
        for row_id, label, logit, probability in zip(ids, labels, logits, probabilities, strict=True)
    ]  # fmt: skip


def check_validation_split(task: Task) -> None:
    """Refuses a validation split that calibration could not be fitted on; a task may have none."""
    if "validation" not in task.splits:
        return
    counts = class_counts(task.splits["validation"])
    if not counts["positive"] or not counts["negative"]:
        raise ValueError(
            f"The validation split of {task.name!r} needs labelled rows of both classes, for calibration and "
            f"threshold, got {counts['positive']} positive and {counts['negative']} negative. Add some, or take the "
            "split out of the task."
        )


def logits_and_labels(model: ClsGenForCausalLMAndClassification, rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """The number's logits before calibration (float64) and the [`hard_labels`] of a task's labelled rows."""
    texts = [{field: row[field] for field in model.encoder.prompt.fields} for row in rows]
    logits = [prediction.logit for prediction in model.classify_iter(texts, progress=True)]
    return np.array(logits), hard_labels(rows["label"])


def calibrate(
    config: ClsGenConfig,
    logits: np.ndarray,
    labels: np.ndarray,
    options: CalibrationArguments,
) -> dict[str, Any]:
    """Fits temperature, bias, threshold and prediction sets on the validation split, and writes them into `config`.

    Args:
        config ([`ClsGenConfig`]): The model's.
        logits (`np.ndarray` of shape `(rows,)`): Of the number before calibration, see [`DecisionRule.logits`].
        labels (`np.ndarray` of shape `(rows,)`): 0 or 1.
        options ([`CalibrationArguments`]): How.

    Returns:
        `dict`: Metrics of the validation split, before and after, and how the threshold was chosen.

    Raises:
        ValueError: for a validation split of one class.
    """
    if len(set(labels.tolist())) < 2:
        raise ValueError(
            f"The validation split holds one class only ({set(labels.tolist())}): nothing to calibrate on."
        )
    temperature, bias = fit_temperature_and_bias(logits, labels, fit_bias=config.cls_bias)
    probabilities = calibrated_probabilities(logits, temperature, bias)
    config.calibration = {"temperature": temperature, "bias": bias}
    config.base_rate = float(labels.mean())
    method = options.threshold_method or THRESHOLD_METHODS[0]
    fixed = config.threshold if options.fixed_threshold is None else options.fixed_threshold
    config.threshold = choose_threshold(labels, probabilities, method, fixed)
    error_rate = options.conformal_error_rate or (config.conformal or {"error_rate": 0.1})["error_rate"]
    quantiles = list(conformal_quantiles(labels, probabilities, error_rate))
    config.conformal = {"error_rate": error_rate, "quantiles": quantiles}
    return {**before_and_after("validation", logits, labels, config), "threshold_method": method}


def score_test_split(
    config: ClsGenConfig, logits: np.ndarray, labels: np.ndarray, ids: list[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Metrics of the test split, before and after calibration, and its predictions by id."""
    probabilities = calibrated_probabilities(logits, **config.calibration)
    predictions = prediction_records(ids, labels, logits, probabilities, config.threshold)
    metrics = before_and_after("test", logits, labels, config)
    if config.conformal:
        metrics["test_conformal"] = conformal_coverage(
            labels, probabilities, config.conformal["quantiles"], config.threshold
        )
    return metrics, predictions


def calibrate_and_test(
    config: ClsGenConfig,
    task: Task,
    score_split: Callable[[str, Dataset], tuple[np.ndarray, np.ndarray]],
    options: CalibrationArguments,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Calibrates a finished model on a task's validation split and scores its test split, where there are such.

    Args:
        config ([`ClsGenConfig`]): The model's.
        task ([`Task`]): Rows without a label are left out.
        score_split (`Callable`): Makes logits and labels, as [`calibrate`] takes them, of a split's name and rows.
        options ([`CalibrationArguments`]): How to calibrate.

    Returns:
        What a run's report says of it, and the test split's [`prediction_records`].
    """
    if options.lm_reading_weight is not None:
        config.lm_reading_weight = options.lm_reading_weight
    report, predictions = {}, []
    labelled = {}
    for name in ("validation", "test"):
        if name in task.splits:
            rows = task.splits[name].filter(lambda row: row["label"] is not None)
            logger.info("%s: %d of %d rows have a label and are scored", name, len(rows), len(task.splits[name]))
            labelled[name] = rows
    if "validation" in labelled:
        report |= calibrate(config, *score_split("validation", labelled["validation"]), options)
    if labelled.get("test"):
        rows = labelled["test"]
        metrics, predictions = score_test_split(config, *score_split("test", rows), rows["id"])
        report |= {**metrics, "test_rows_sha256": rows_digest(rows)}
    stored = ("calibration", "base_rate", "conformal", "threshold", "pos_weight", "lm_reading_weight")
    return {**report, **{name: getattr(config, name) for name in stored}}, predictions


def table(report: dict[str, Any]) -> str:
    """The report's splits as an aligned text table."""
    lines = [f"{'':24}" + "".join(f"{name:>18}" for name in HEADLINE_METRICS)]
    for split in ("validation_uncalibrated", "validation", "test_uncalibrated", "test"):
        if split in report:
            values = [report[split][name] for name in HEADLINE_METRICS]
            lines.append(
                f"{split:24}" + "".join("undefined".rjust(18) if math.isnan(v) else f"{v:18.3f}" for v in values)
            )
    return "\n".join(lines)
