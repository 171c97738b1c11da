"""The parts of an evaluation about the numbers: how good, how calibrated, what thresholds do, against others."""

from typing import Any

import numpy as np
import pandas as pd

from clsgen.evaluation import plots
from clsgen.evaluation.comparison import compare
from clsgen.evaluation.evaluated import CALIBRATED_ON, TRAINED_ON, Evaluated, Section, number, shown, spread
from clsgen.evaluation.intervals import metrics_with_intervals
from clsgen.evaluation.report import Paragraph, Part, Plot, Plots, Table
from clsgen.evaluation.thresholds import threshold_sheet

METRIC_NAMES = {
    "auroc": "AUROC", "average_precision": "Average precision", "f1": "F1 at the stored threshold",
    "f1_at_half": "F1 at 0.5", "accuracy": "Accuracy", "balanced_accuracy": "Balanced accuracy",
    "mcc": "Matthews correlation (MCC)", "brier": "Brier score (lower is better)",
    "ece": "Expected calibration error (lower is better)", "log_loss": "Log loss, nats (lower is better)",
}  # fmt: skip
TARGET_NAMES = {
    "stored": "stored in the model", "half": "0.5", "sensitivity": "sensitivity at least {:g}",
    "specificity": "specificity at least {:g}", "ppv": "PPV at least {:g}",
    "cost_ratio": "miss = {:g} false alarms",
}  # fmt: skip
FEW_ROWS = 200


def _arrays(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    return frame["gold"].to_numpy(int), frame["probability"].to_numpy(float)


def classification(evaluated: Evaluated) -> Section:
    """Metrics of the probabilities and decisions, and their curves."""
    labels, probabilities = _arrays(evaluated.numbers)
    threshold, seed = evaluated.threshold, evaluated.seed
    metrics = metrics_with_intervals(labels, probabilities, threshold, evaluated.samples, seed)
    blocks: list[Any] = []
    if len(labels) < FEW_ROWS:
        blocks.append(
            Paragraph(f"Only {len(labels)} rows: read the intervals, not the third digit of a number.", warning=True)
        )
    rows = [[name, number(metrics[key]["value"]), spread(metrics[key])] for key, name in METRIC_NAMES.items()]
    note = (
        f"Intervals are 95%, by bootstrap over rows ({evaluated.samples} samples, BCa; see the docstring of "
        f"evaluation/intervals.py). With these probabilities a perfectly calibrated model would show a calibration "
        f"error of {metrics['ece']['by_chance']:.3f} by chance alone."
    )
    figures = [
        Plot(
            "reliability", "Reliability", plots.reliability(labels, probabilities),
            "On the line: the number can be taken at its word",
        ),
        Plot(
            "histogram", "Probabilities by label", plots.histogram(labels, probabilities, threshold, evaluated.labels),
            "Upwards label 1, downwards label 0",
        ),
        Plot(
            "decision_curve", "Decision curve", plots.decision_curve(labels, probabilities, seed),
            "Worth acting on where it is above both others",
        ),
    ]  # fmt: skip
    if 0 < labels.sum() < len(labels):
        curves = [
            Plot(
                "roc", "ROC curve", plots.roc(labels, probabilities, threshold, seed),
                f"AUROC {shown(metrics['auroc'])}",
            ),
            Plot(
                "precision_recall", "Precision and recall",
                plots.precision_recall(labels, probabilities, threshold, seed),
                f"Average precision {shown(metrics['average_precision'])}",
            ),
        ]  # fmt: skip
        figures = [*curves, *figures]
    for mode, frame in evaluated.explained.items():
        if frame.get("judged_label") is not None and frame["judged_label"].notna().any():
            judge = next(iter(evaluated.alignment[mode]))
            svg = plots.alignment(frame, threshold, evaluated.labels)
            figures.append(Plot(f"alignment_{mode}", f"Number and words, {mode}", svg, f"Judge: {judge}"))
    blocks += [Table(["metric", "value", "95% interval"], rows, note), Plots(figures)]
    return Section(metrics, Part("How good the numbers are", blocks))


def calibration(evaluated: Evaluated) -> Section:
    """Calibration on every data set at hand, and whether the model was calibrated on it."""
    sets = {}
    if evaluated.validation is not None:
        sets[f"validation ({evaluated.validation_relation})"] = evaluated.validation
    sets[f"{evaluated.rows.name} ({evaluated.relation})"] = evaluated.numbers
    sets |= evaluated.others
    numbers, rows, figures = {}, [], []
    for name, frame in sets.items():
        labels, probabilities = _arrays(frame)
        metrics = metrics_with_intervals(labels, probabilities, evaluated.threshold, evaluated.samples, evaluated.seed)
        numbers[name] = {
            "rows": len(labels),
            "mean_probability": float(probabilities.mean()),
            "share_of_label_1": float(labels.mean()),
            **metrics,
        }
        row = [name, str(len(labels)), number(probabilities.mean()), number(labels.mean()), shown(metrics["ece"])]
        rows.append([*row, number(metrics["ece"]["by_chance"]), shown(metrics["brier"]), shown(metrics["auroc"])])
    for i, (name, frame) in enumerate(evaluated.others.items()):
        figures.append(Plot(f"reliability_other_{i}", f"Reliability on {name}", plots.reliability(*_arrays(frame))))
    columns = [
        "data", "rows", "mean probability", "share of label 1", "calibration error", "of a perfect one", "Brier score",
        "AUROC",
    ]  # fmt: skip
    note = (
        "Calibration error over bins of equal mass, and the mean one of a model that is perfectly calibrated, on as "
        "many rows with the same probabilities. Calibration holds for data like those it was fitted on; others "
        "need their own."
    )
    if not evaluated.others:
        note += " No other data set was named: see --also_on."
    blocks = [Table(columns, rows, note), *([Plots(figures)] if figures else [])]
    return Section(numbers, Part("Calibration, here and elsewhere", blocks))


def thresholds(evaluated: Evaluated) -> Section:
    """The threshold sheet."""
    validation = None if evaluated.validation is None else _arrays(evaluated.validation)
    sheet = threshold_sheet(
        validation, _arrays(evaluated.numbers), evaluated.threshold, evaluated.targets, evaluated.samples,
        evaluated.seed,
    )  # fmt: skip
    rows = []
    for entry in sheet:
        kind, value = entry["target"]["kind"], entry["target"]["value"]
        reached = entry["on_reported"] or {}
        cells = [shown(reached[key]) if reached else "" for key in ("sensitivity", "specificity", "ppv", "npv")]
        rows.append([TARGET_NAMES[kind].format(value), shown(entry["threshold"]), *cells])
        rows[-1].append(number(reached["flagged"]["value"]) if reached else "")
    fitted_on = "no validation rows" if validation is None else f"{len(validation[0])} validation rows"
    unseen = evaluated.relation not in (CALIBRATED_ON, TRAINED_ON)
    part = "which had no part in it" if unseen else "where the stored threshold was chosen or the model trained"
    note = (
        f"Thresholds are fitted on {fitted_on} (interval: bootstrap of the choice); everything to their right is "
        f"{evaluated.rows.name}, {part} (intervals: Wilson). A target that was reached on few validation rows may be "
        "missed on others. Were the probabilities perfectly calibrated, the least cost where a miss costs r false "
        "alarms would lie at 1 / (1 + r)."
    )
    columns = ["wanted", "threshold", "sensitivity", "specificity", "PPV", "NPV", "flagged"]
    return Section(sheet, Part("Threshold sheet", [Table(columns, rows, note)]))


def comparison(evaluated: Evaluated) -> Section | None:
    """Paired tests against other systems on the same rows."""
    if not evaluated.compared:
        return None
    numbers, rows = {}, []
    ours = evaluated.numbers.set_index("id")
    for name, theirs in evaluated.compared.items():
        shared = [row_id for row_id in ours.index if row_id in theirs.index]
        mine, other = ours.loc[shared], theirs.loc[shared]
        result = compare(
            mine["gold"], mine["probability"], other["probability"], mine["predicted"], other["predicted"],
            evaluated.samples, evaluated.seed,
        )  # fmt: skip
        numbers[name] = {**result, "rows_not_shared": len(ours) - len(shared)}
        for key, estimate in result["differences"].items():
            p_value = ""
            if key == "auroc":
                p_value = _p_value(result["delong"], "DeLong")
            rows.append([f"{name}: {METRIC_NAMES[key]}, ours less theirs", shown(estimate), p_value])
        tested = result["mcnemar"]
        told = f"{tested['only_ours_right']} / {tested['only_theirs_right']}"
        rows.append([f"{name}: rows that only we / only they get right", told, _p_value(tested, "McNemar, exact")])
    note = (
        "The same rows and the same bootstrap draws for both systems; p values are two-sided and not corrected for "
        "their number."
    )
    return Section(numbers, Part("Against other systems", [Table(["", "", "p"], rows, note)]))


def speed(evaluated: Evaluated) -> Section | None:
    """Answers a second."""
    if evaluated.speed is None:
        return None
    found = evaluated.speed
    rows = [["numbers alone", str(found["texts"]), number(found["texts_per_second"], 2)]]
    if found["explanations"]:
        rows.append(["with an explanation", str(found["explanations"]), number(found["explanations_per_second"], 2)])
    on = f"{found['device']}, {found['threads']} threads" if found["device"] == "cpu" else found["device"]
    note = f"One call each, {found['dtype']} on {on}; whatever else the machine did meanwhile is not taken off."
    return Section(found, Part("Speed", [Table(["answers", "texts", "texts a second"], rows, note)]))


def _p_value(test: dict[str, Any], name: str) -> str:
    return f"untested: {test['reason']}" if test["p_value"] is None else f"{test['p_value']:.3g} ({name})"
