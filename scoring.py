"""After training: calibration on the validation split, the numbers of each split, and their table."""

import math
from typing import Any

import numpy as np
from datasets import Dataset

from clsgen.calibration import (
    calibrated_probabilities,
    choose_threshold,
    conformal_coverage,
    conformal_quantiles,
    fit_temperature_and_bias,
)
from clsgen.classification_metrics import classification_metrics
from clsgen.configuration_clsgen import ClsGenConfig
from clsgen.publishing.cards import CARD_METRICS
from clsgen.trainer_clsgen import ClsGenSFTTrainer


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


def calibrate(
    trainer: ClsGenSFTTrainer,
    config: ClsGenConfig,
    threshold_method: str = "f1",
    fixed_threshold: float = 0.5,
    conformal_error_rate: float = 0.1,
) -> dict[str, Any]:
    """Fits temperature, bias, threshold and prediction sets on the validation split, and writes them into `config`.

    Args:
        trainer ([`ClsGenSFTTrainer`]): Its evaluation rows are the validation split.
        config ([`ClsGenConfig`]): The model's.
        threshold_method, fixed_threshold: See [`choose_threshold`].
        conformal_error_rate (`float`, *optional*, defaults to 0.1): See [`conformal_quantiles`].

    Returns:
        `dict`: Metrics of the validation split, before and after.

    Raises:
        ValueError: for a validation split of one class.
    """
    logits, labels = trainer.decisions(trainer.predict(trainer.eval_dataset, metric_key_prefix="validation"))
    if len(set(labels.tolist())) < 2:
        raise ValueError(
            f"The validation split holds one class only ({set(labels.tolist())}): nothing to calibrate on."
        )
    temperature, bias = fit_temperature_and_bias(logits, labels, fit_bias=config.cls_bias)
    probabilities = calibrated_probabilities(logits, temperature, bias)
    config.calibration = {"temperature": temperature, "bias": bias}
    config.base_rate = float(labels.mean())
    config.threshold = choose_threshold(labels, probabilities, threshold_method, fixed_threshold)
    quantiles = list(conformal_quantiles(labels, probabilities, conformal_error_rate))
    config.conformal = {"error_rate": conformal_error_rate, "quantiles": quantiles}
    return before_and_after("validation", logits, labels, config)


def score_test_split(
    trainer: ClsGenSFTTrainer, config: ClsGenConfig, rows: Dataset, ids: list[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Metrics of the test split, before and after calibration, and its predictions by id."""
    logits, labels = trainer.decisions(trainer.predict(rows, metric_key_prefix="test"))
    probabilities = calibrated_probabilities(logits, **config.calibration)
    predictions = prediction_records(ids, labels, logits, probabilities, config.threshold)
    metrics = before_and_after("test", logits, labels, config)
    if config.conformal:
        metrics["test_conformal"] = conformal_coverage(labels, probabilities, config.conformal["quantiles"])
    return metrics, predictions


def table(report: dict[str, Any]) -> str:
    """The report's splits as an aligned text table."""
    lines = [f"{'':24}" + "".join(f"{name:>18}" for name in CARD_METRICS)]
    for split in ("validation_uncalibrated", "validation", "test_uncalibrated", "test"):
        if split in report:
            values = [report[split][name] for name in CARD_METRICS]
            lines.append(
                f"{split:24}" + "".join("undefined".rjust(18) if math.isnan(v) else f"{v:18.3f}" for v in values)
            )
    return "\n".join(lines)
