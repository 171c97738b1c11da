"""The parts of an evaluation about the words: do they agree with the number, how they read, and examples."""

from typing import Any

import numpy as np
import pandas as pd

from clsgen.evaluation.alignment import auroc_by_weight, leakage_report, second_reading_report
from clsgen.evaluation.evaluated import CALIBRATED_ON, Evaluated, Section, number, shown
from clsgen.evaluation.intervals import agreement_with_intervals
from clsgen.evaluation.language import language_report
from clsgen.evaluation.report import Example, Examples, Paragraph, Part, Table
from clsgen.evaluation.sentences import without_verdict_lines

LONGEST_TEXT = 900


def alignment(evaluated: Evaluated) -> Section | None:
    """Whether words and number agree, by mode and judge."""
    if not evaluated.explained:
        return None
    numbers: dict[str, Any] = {"undefined": evaluated.unjudged} if evaluated.unjudged else {}
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
            measured = fitness and fitness["rows"]
            told = f"{number(fitness['accuracy'])} of {fitness['judged']}" if measured else "unmeasured"
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
    if "free" in evaluated.explained and evaluated.free_is_held:
        note += (
            " Free words of this model begin with the verdict line that the LM's own reading decides for, cut where "
            "the number is."
        )
    warnings = [
        f"The judge {judge} is unfit (right on fewer than 95% of the teacher's explanations)."
        for judge in sorted(unfit)
    ]
    warnings += [f"Alignment by {judge} is undefined: {reason}." for judge, reason in evaluated.unjudged.items()]
    blocks = [
        *(Paragraph(warning, warning=True) for warning in warnings),
        *([Table(columns, rows, note)] if rows else []),
    ]
    return Section(numbers, Part("Do the words agree with the number?", blocks))


def second_reading(evaluated: Evaluated) -> Section | None:
    """Whether the LM's own reading of the verdict knows anything."""
    frame = next((rows for rows in evaluated.modes.values() if rows["lm_probability"].notna().all()), None)
    if frame is None:
        return None
    report = second_reading_report(frame, evaluated.threshold, evaluated.samples, evaluated.seed)
    names = {
        "auroc": "AUROC of the LM's reading for the true label",
        "agreement": "rows where it is on the decision's side",
        "errors_where_agreed": "wrong decisions among these rows",
        "errors_where_not": "wrong decisions among the others",
        "auroc_of_distance": "AUROC for a wrong decision: of its distance from the probability",
        "auroc_of_closeness": "AUROC for a wrong decision: of the probability's closeness to the threshold",
    }
    note = (
        "The LM's reading (lm_probability) is how likely it finds the verdict of label 1 itself. Where its distance "
        "from the probability does not tell wrong decisions from right ones (AUROC of 0.5 or less), a disagreement "
        "means nothing."
    )
    blocks = [Table(["", "share or AUROC"], [[name, shown(report[key])] for key, name in names.items()], note)]
    # Of rows that calibration has seen alone: a weight that was picked by test rows would flatter them.
    weights = auroc_by_weight(frame, evaluated.lm_reading_weight) if evaluated.relation == CALIBRATED_ON else {}
    if weights:
        report["auroc_by_weight"] = weights
        note = (
            "The number's AUROC, were lm_reading_weight another than the model's "
            f"{evaluated.lm_reading_weight:g}; calibrate_clsgen.py fits the checkpoint with it."
        )
        blocks.append(Table(["weight", *weights], [["AUROC", *map(number, weights.values())]], note))
    return Section(report, Part("What the LM's own reading is worth", blocks))


def leakage(evaluated: Evaluated) -> Section | None:
    """What the words add for one who wants to foresee the decision."""
    if not evaluated.explained:
        return None
    texts = evaluated.rows.plain()
    numbers = {}
    for mode, frame in evaluated.explained.items():
        seen = [without_verdict_lines(told or "", evaluated.verdicts) for told in frame["explanation"]]
        numbers[mode] = leakage_report(frame.assign(explanation=seen), texts, evaluated.seed)
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
        mode: language_report(frame["explanation"].tolist(), texts, references, question=evaluated.asked)
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
        f"probability of {evaluated.labels[1]}": number(row["probability"]),
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
