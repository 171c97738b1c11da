"""The parts of an evaluation: each computes its numbers for `metrics.json`, and says how the report shows them.

A further part is a function from [`Evaluated`] to [`Section`], and its entry in `SECTIONS`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from clsgen.evaluation import plots
from clsgen.evaluation.alignment import leakage_report
from clsgen.evaluation.comparison import compare
from clsgen.evaluation.intervals import SAMPLES, agreement_with_intervals, metrics_with_intervals
from clsgen.evaluation.language import language_report
from clsgen.evaluation.predictions import LabelledTexts
from clsgen.evaluation.report import Example, Examples, Paragraph, Part, Plot, Plots, Table
from clsgen.evaluation.thresholds import Target, threshold_sheet

METRIC_NAMES = {
    "auroc": "AUROC", "average_precision": "Average precision", "f1": "F1 at the stored threshold",
    "f1_at_half": "F1 at 0.5", "accuracy": "Accuracy", "balanced_accuracy": "Balanced accuracy",
    "mcc": "Matthews correlation (MCC)", "brier": "Brier score (lower is better)",
    "ece": "Expected calibration error (lower is better)", "log_loss": "Log loss, nats (lower is better)",
}  # fmt: skip
TARGET_NAMES = {
    "stored": "stored in the model", "half": "0.5", "sensitivity": "sensitivity at least {:g}",
    "specificity": "specificity at least {:g}", "ppv": "PPV at least {:g}",
    "cost_ratio": "a miss costs {:g} false alarms",
}  # fmt: skip
FEW_ROWS = 200
LONGEST_TEXT = 900


@dataclass
class Evaluated:
    """What sections read.

    Args:
        rows ([`LabelledTexts`]): The reported rows.
        modes (`dict[str, pandas.DataFrame]`): Their answers by mode of explanation; columns as of
            `predictions.SCHEMA`. The numbers are those of the first mode.
        threshold (`float`), labels (`tuple[str, str]`): The model's.
        validation (`pandas.DataFrame`, *optional*): Answers for the rows that the model was calibrated on.
        others (`dict[str, pandas.DataFrame]`): Answers for data that it was not calibrated on.
        compared (`dict[str, pandas.DataFrame]`): Other systems' predictions, indexed by id.
        targets (`list[Target]`): For the threshold sheet.
        alignment (`dict`): By mode and judge, what [`alignment.alignment_report`] gives.
        unjudged (`str`): Why there is none.
        collapse (`dict`, *optional*): What [`collapse.perplexity_report`] gives.
        examples (`int`): Most examples of a kind.
        samples, seed (`int`): Of the bootstrap.
    """

    rows: LabelledTexts
    modes: dict[str, pd.DataFrame]
    threshold: float
    labels: tuple[str, str]
    validation: pd.DataFrame | None = None
    others: dict[str, pd.DataFrame] = field(default_factory=dict)
    compared: dict[str, pd.DataFrame] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    alignment: dict[str, dict[str, Any]] = field(default_factory=dict)
    unjudged: str = ""
    collapse: dict[str, Any] | None = None
    examples: int = 3
    samples: int = SAMPLES
    seed: int = 0

    @property
    def numbers(self) -> pd.DataFrame:
        """One row a text, with what doesn't depend on the mode."""
        return next(iter(self.modes.values()))

    @property
    def explained(self) -> dict[str, pd.DataFrame]:
        """The modes that write."""
        return {mode: frame for mode, frame in self.modes.items() if mode != "none"}


@dataclass(frozen=True)
class Section:
    """Numbers for `metrics.json` under the section's name, and a part of the report."""

    numbers: Any
    part: Part


def number(value: float | None, digits: int = 3) -> str:
    """A number as the report shows it."""
    return "undefined" if value is None or not np.isfinite(value) else f"{value:.{digits}f}"


def spread(estimate: dict[str, Any]) -> str:
    """An estimate's interval, or why there is none."""
    if estimate["low"] is None:
        return estimate.get("reason", "")
    return f"{estimate['low']:.3f} to {estimate['high']:.3f}"


def shown(estimate: dict[str, Any]) -> str:
    """An estimate with its interval, in one cell."""
    if estimate["value"] is None:
        return f"undefined: {estimate['reason']}"
    return f"{estimate['value']:.3f} ({spread(estimate)})" if spread(estimate) else number(estimate["value"])


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
    sets = {} if evaluated.validation is None else {"validation (calibrated on it)": evaluated.validation}
    sets[f"{evaluated.rows.name} (not seen)"] = evaluated.numbers
    sets |= {f"{name} (another data set)": frame for name, frame in evaluated.others.items()}
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
        "data", "rows", "mean probability", "share of label 1", "calibration error", "of it by chance", "Brier score",
        "AUROC",
    ]  # fmt: skip
    note = (
        "Calibration error over bins of equal mass. Calibration holds for data like those it was fitted on; others "
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
    note = (
        f"Thresholds are fitted on {fitted_on} (interval: bootstrap of the choice); everything to their right is "
        f"{evaluated.rows.name}, which had no part in it (intervals: Wilson). A target that was reached on few "
        "validation rows may be missed on others."
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


def _p_value(test: dict[str, Any], name: str) -> str:
    return f"untested: {test['reason']}" if test["p_value"] is None else f"{test['p_value']:.3g} ({name})"


def alignment(evaluated: Evaluated) -> Section | None:
    """Whether words and number agree, by mode and judge."""
    if not evaluated.explained:
        return None
    title = "Do the words agree with the number?"
    if not evaluated.alignment:
        reason = f"Alignment is undefined: {evaluated.unjudged}."
        return Section({"undefined": evaluated.unjudged}, Part(title, [Paragraph(reason, warning=True)]))
    numbers: dict[str, Any] = {}
    rows, unfit = [], set()
    for mode, reports in evaluated.alignment.items():
        frame, numbers[mode] = evaluated.modes[mode], {}
        for judge, report in reports.items():
            judged = [label is not None for label in report["judged_label"]]
            labels = [label for label in report["judged_label"] if label is not None]
            intervals = agreement_with_intervals(
                frame["probability"][judged], frame["predicted"][judged], labels, evaluated.samples, evaluated.seed
            )
            kept = {key: value for key, value in report.items() if not key.startswith("judged_")}
            numbers[mode][judge] = {**kept, "with_intervals": intervals}
            worth, fitness = report["judge"], report["judge"]["fitness"]
            if fitness and fitness["fit"] is False:
                unfit.add(judge)
            told = "unmeasured" if not fitness else f"{number(fitness['accuracy'])} of {fitness['judged']}"
            sees = "kept" if worth["keeps_verdict_sentence"] else "removed"
            counts = f"{report['judged']} of {report['rows']}"
            cells = [shown(intervals[key]) for key in ("auroc_alignment", "kappa", "contradiction_rate")]
            rows.append([f"{mode}, {judge}", sees, told, counts, *cells, number(report["words_accuracy"])])
    columns = [
        "mode, judge", "verdict sentence", "judge's own accuracy", "judged", "AUROC-alignment", "Cohen's kappa",
        "contradiction rate", "words right",
    ]  # fmt: skip
    note = (
        "A judge reads explanations alone, without the verdict line. Its own accuracy is that on the teacher's "
        "validation explanations, which argue for a known label: no alignment number is worth more than its judge. "
        "Agreement is not faithfulness: it does not show how the number came about."
    )
    blocks = [
        Paragraph(f"The judge {judge} is unfit (accuracy below 0.95 with the verdict sentence).", warning=True)
        for judge in sorted(unfit)
    ]
    return Section(numbers, Part(title, [*blocks, Table(columns, rows, note)]))


def leakage(evaluated: Evaluated) -> Section | None:
    """What the words add for one who wants to foresee the decision."""
    if not evaluated.explained:
        return None
    texts = evaluated.rows.plain()
    numbers = {mode: leakage_report(frame, texts, evaluated.seed) for mode, frame in evaluated.explained.items()}
    rows = []
    for target, of_what in (("predicted", "decision"), ("gold", "true label")):
        for sees in ("input_only", "explanation_only", "both"):
            name = f"AUROC for the {of_what} from {sees.replace('_', ' ')}"
            rows.append([name, *(_or_reason(report, target, report[target][sees]) for report in numbers.values())])
    rows.append(["Leakage-adjusted simulatability (LAS)", *(_or_reason(r, "las", r["las"]) for r in numbers.values())])
    note = (
        "A small simulator (TF-IDF and logistic regression, cross-validated on these rows) foresees the decision from "
        "text, explanation or both. Explanations that alone give the decision away leak it; LAS is what they add "
        "beyond that (Hase et al. 2020). Few rows: rough numbers."
    )
    return Section(numbers, Part("What the words give away, and add", [Table(["", *numbers], rows, note)]))


def _or_reason(report: dict[str, Any], name: str, value: Any) -> str:
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return f"undefined: {report['undefined'].get(name, 'no rows')}"
    return number(value) if isinstance(value, float) else str(value)


def language(evaluated: Evaluated) -> Section | None:
    """How the explanations read, by mode."""
    if not evaluated.explained:
        return None
    texts, references = evaluated.rows.plain(), evaluated.rows.explanations
    numbers = {
        mode: language_report(frame["explanation"].tolist(), texts, references)
        for mode, frame in evaluated.explained.items()
    }
    names = [name for name in next(iter(numbers.values())) if name != "undefined"]
    rows = [
        [name.replace("_", " "), *(_or_reason(report, name, report[name]) for report in numbers.values())]
        for name in names
    ]
    note = "Means over explanations; see the docstring of evaluation/language.py for each."
    return Section(numbers, Part("Language of the explanations", [Table(["", *numbers], rows, note)]))


def collapse(evaluated: Evaluated) -> Section | None:
    """Perplexity against the backbone's."""
    if evaluated.collapse is None:
        return None
    rows = []
    for name in ("general", "explanations"):
        report = evaluated.collapse[name]
        values = [number(report[key], 2) for key in ("perplexity", "backbone_perplexity")]
        rows.append([f"{name} text", *values, number(report["ratio"]), str(report["tokens"])])
    note = "A ratio far above 1 on general text: training for the task has cost the language model its language."
    columns = ["", "perplexity", "backbone's", "ratio", "tokens"]
    return Section(evaluated.collapse, Part("Linguistic collapse", [Table(columns, rows, note)]))


def examples(evaluated: Evaluated) -> Section | None:
    """Rows to look at: right, wrong, contradictory, least certain."""
    if not evaluated.examples:
        return None
    frame = evaluated.numbers.reset_index(drop=True)
    distance = (frame["probability"] - evaluated.threshold).abs()
    right = frame["predicted"] == frame["gold"]
    contradicts = pd.Series(False, index=frame.index)
    for answers in evaluated.explained.values():
        if "judged_label" in answers:
            judged = answers["judged_label"].reset_index(drop=True)
            contradicts |= judged.notna() & (judged != answers["predicted"].reset_index(drop=True))
    kinds = {
        "Right": ("The surest right decisions.", distance[right].nlargest(evaluated.examples)),
        "Wrong": ("The surest wrong decisions.", distance[~right].nlargest(evaluated.examples)),
        "Contradictory": (
            "Words that, by the judge, argue against the decision.",
            distance[contradicts].nlargest(evaluated.examples),
        ),
        "Least certain": ("The nearest to the threshold.", distance.nsmallest(evaluated.examples)),
    }  # fmt: skip
    blocks, numbers = [], {}
    for title, (note, chosen) in kinds.items():
        numbers[title.lower()] = frame.loc[chosen.index, "id"].tolist()
        note = note if len(chosen) else "There are none."
        blocks.append(Examples(title, note, [_example(evaluated, index) for index in chosen.index]))
    return Section(numbers, Part("Examples", blocks))


def _example(evaluated: Evaluated, index: int) -> Example:
    row = evaluated.numbers.iloc[index]
    text = evaluated.rows.texts[index]
    fields = {"text": text} if isinstance(text, str) else text
    facts = {
        "probability": number(row["probability"]),
        "decision": evaluated.labels[int(row["predicted"])],
        "truth": evaluated.labels[int(row["gold"])],
    }
    explanations = {}
    for mode, frame in evaluated.explained.items():
        answer = frame.iloc[index]
        label = answer.get("judged_label")
        read = "" if label is None or pd.isna(label) else f", read as {evaluated.labels[int(label)]}"
        explanations[f"{mode}{read}"] = answer["explanation"] or "(empty)"
    return Example(row["id"], {name: _shortened(value) for name, value in fields.items()}, facts, explanations)


def _shortened(text: str) -> str:
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[: LONGEST_TEXT // 2]} [...] {text[-LONGEST_TEXT // 2 :]}"


SECTIONS: dict[str, Callable[[Evaluated], Section | None]] = {
    "classification": classification,
    "calibration": calibration,
    "thresholds": thresholds,
    "comparison": comparison,
    "alignment": alignment,
    "leakage": leakage,
    "language": language,
    "collapse": collapse,
    "examples": examples,
}
