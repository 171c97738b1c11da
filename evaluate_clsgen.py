"""Evaluates a checkpoint on a task: metrics with intervals, predictions, and a report to read.

python evaluate_clsgen.py --model outputs/trial_claims/model --task trial_claims
python evaluate_clsgen.py --model outputs/trial_claims/model --task trial_claims --modes none --compare other.parquet
"""

import json
import logging
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import AutoModel, HfArgumentParser

from clsgen.atomic_io import write_json, write_text
from clsgen.backbones import resolve_backbone
from clsgen.evaluation import number_sections, word_sections
from clsgen.evaluation.alignment import alignment_report
from clsgen.evaluation.asking import RowsToAsk, relation, rows_to_ask
from clsgen.evaluation.collapse import perplexity_report
from clsgen.evaluation.evaluated import Evaluated, Section, number, spread
from clsgen.evaluation.judges import DEFAULT_JUDGES, Judge, default_judges, make_judge
from clsgen.evaluation.predictions import (
    SCHEMA,
    LabelledTexts,
    asked_of,
    known_when_guided,
    predict,
    read_predictions,
    table_rows,
)
from clsgen.evaluation.report import Report
from clsgen.evaluation.speed import speed_report
from clsgen.evaluation.thresholds import Target
from clsgen.run_record import describe_run, without_secrets
from clsgen.table_files import write_rows
from clsgen.tasks import SPLITS, Task, load_task

logger = logging.getLogger("clsgen.evaluate_clsgen")
MODES = ("guided", "free", "none")
# The parts of an evaluation, in the report's order; a further one is a function and its entry here.
SECTIONS: dict[str, Callable[[Evaluated], Section | None]] = {
    "classification": number_sections.classification,
    "calibration": number_sections.calibration,
    "thresholds": number_sections.thresholds,
    "comparison": number_sections.comparison,
    "alignment": word_sections.alignment,
    "second_reading": word_sections.second_reading,
    "leakage": word_sections.leakage,
    "language": word_sections.language,
    "collapse": word_sections.collapse,
    "examples": word_sections.examples,
    "speed": number_sections.speed,
}
HEADLINE = {
    "auroc": "AUROC", "average_precision": "Average precision", "f1": "F1", "brier": "Brier score",
    "ece": "Calibration error",
}  # fmt: skip


@dataclass
class EvaluationArguments:
    """What to evaluate, on what, and how."""

    model: str = field(metadata={"help": "A CLSGen checkpoint: a folder or a Hub id. Its code is run."})
    task: str = field(metadata={"help": "A task's folder, or its name below data/."})
    revision: str | None = field(default=None, metadata={"help": "Commit of the Hub repo; pin what you have read."})
    data_dir: str | None = field(default=None, metadata={"help": "The source that the task's prepare.py reads."})
    split: str = field(default="test", metadata={"help": "The split that is reported.", "choices": list(SPLITS)})
    output_dir: str | None = field(
        default=None, metadata={"help": "Where the results go; default outputs/<task>/evaluation."}
    )
    modes: list[str] = field(
        default_factory=lambda: ["guided", "free"],
        metadata={"help": "Explanations to write: `guided`, `free`, both, or `none` for numbers alone."},
    )
    limit: int | None = field(default=None, metadata={"help": "Most rows of each split, drawn at random."})
    batch_size: int | None = field(default=None, metadata={"help": "Most texts of a batch."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Longest explanation, in tokens."})
    explanation_guidance_scale: float | None = field(
        default=None, metadata={"help": "Instead of the checkpoint's: how firmly words are held to a verdict."}
    )
    also_on: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Tasks to report calibration on too, each NAME or NAME=SOURCE (what its prepare.py reads); "
            "numbers alone, test split, or where there is none the training split."
        },
    )
    compare: list[str] = field(
        default_factory=list,
        metadata={"help": "Files with other systems' predictions of the same rows (id, probability, predicted)."},
    )
    judges: list[str] = field(
        default_factory=lambda: list(DEFAULT_JUDGES),
        metadata={
            "help": "tfidf, tfidf-no-verdict, openai:MODEL[@URL] or lm:MODEL; the first one's reading is stored."
        },
    )
    backbone: str | None = field(
        default=None, metadata={"help": "What the model was made from, to compare perplexity with it."}
    )
    sensitivities: list[float] = field(default_factory=lambda: [0.8, 0.9, 0.95], metadata={"help": "Wanted."})
    specificities: list[float] = field(default_factory=lambda: [0.8, 0.9, 0.95], metadata={"help": "Wanted."})
    ppvs: list[float] = field(default_factory=lambda: [0.8, 0.9], metadata={"help": "Wanted predictive values."})
    cost_ratios: list[float] = field(
        default_factory=lambda: [0.25, 1.0, 4.0], metadata={"help": "What a miss costs, in false alarms."}
    )
    examples: int = field(default=3, metadata={"help": "Most examples of a kind in the report."})
    bootstrap_samples: int = field(default=2000, metadata={"help": "Samples behind each interval."})
    seed: int = field(default=0, metadata={"help": "Of bootstrap and --limit."})
    overwrite: bool = field(default=False, metadata={"help": "Forget the predictions of an earlier run."})

    def __post_init__(self):
        self.modes = list(dict.fromkeys(self.modes))
        unknown = [mode for mode in self.modes if mode not in MODES]
        if unknown or not self.modes or ("none" in self.modes and len(self.modes) > 1):
            raise ValueError(f"`modes` is `guided`, `free`, both, or `none` alone, got {self.modes}.")
        if not self.judges:
            raise ValueError("`judges` is empty: name a judge, leave it out, or take `modes` none.")
        self.judges = list(dict.fromkeys(self.judges))
        names = [judge.partition("@")[0] if judge.startswith("openai:") else judge for judge in self.judges]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"`judges` names {name} at two addresses: ask each in an evaluation of its own.")
        for name, least in (("limit", 1), ("bootstrap_samples", 100), ("examples", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        scale = self.explanation_guidance_scale
        if scale is not None and not 0 < scale < math.inf:
            raise ValueError(f"`explanation_guidance_scale` must be a finite number above 0, got {scale}.")

    @property
    def targets(self) -> list[Target]:
        """What the threshold sheet finds thresholds for; raises `ValueError` for one that makes no sense."""
        wanted = {
            "sensitivity": self.sensitivities, "specificity": self.specificities, "ppv": self.ppvs,
            "cost_ratio": self.cost_ratios,
        }  # fmt: skip
        return [Target(kind, value) for kind, values in wanted.items() for value in values]


def evaluate_checkpoint(arguments: EvaluationArguments, argv: list[str] | None = None) -> dict[str, Any]:
    """Evaluates a checkpoint on a task, and writes `metrics.json`, `predictions.parquet`, `report.md`, `report.html`.

    Args:
        arguments ([`EvaluationArguments`]): What to evaluate; `EvaluationArguments(model=..., task=...)` will do.
        argv (`list[str]`, *optional*): The command line, for the record.

    Returns:
        `dict`: What `metrics.json` holds: a section each of `classification`, `calibration`, `thresholds`, `speed`,
        and where asked for `comparison`, `alignment`, `second_reading`, `leakage`, `language`, `collapse`, `examples`.
        An undefined value is None with a `reason` beside it.

    Raises:
        ValueError, OSError: for arguments, a task, texts or files that can't be used.
    """
    targets = arguments.targets
    compared = {path: read_predictions(Path(path)) for path in arguments.compare}
    task = load_task(arguments.task, arguments.data_dir)
    others = {}
    for given in arguments.also_on:
        name, _, source = given.partition("=")
        others[given] = load_task(name, source or None)
    output_dir = Path(arguments.output_dir or Path("outputs") / task.name / "evaluation")
    # Before hours of generation, which a mistyped name would waste.
    if arguments.backbone:
        resolve_backbone(arguments.backbone)
    judges, unjudged = _judges(task, arguments, output_dir / "answers")
    output_dir.mkdir(parents=True, exist_ok=True)
    about = {"revision": arguments.revision, "trust_remote_code": True}
    model = AutoModel.from_pretrained(arguments.model, device_map="auto", **about)
    if arguments.explanation_guidance_scale is not None:
        if not hasattr(model.config, "explanation_guidance_scale"):
            raise ValueError(
                f"{arguments.model} comes with code of its own from before `explanation_guidance_scale`: evaluate it "
                "without."
            )
        model.config.explanation_guidance_scale = arguments.explanation_guidance_scale
    asked = rows_to_ask(model, task, others, arguments.split, arguments.limit, arguments.seed)
    compared = {name: _checked(name, frame, asked.reported) for name, frame in compared.items()}
    evaluated = _predicted(model, task, asked, arguments, output_dir)
    evaluated.targets, evaluated.compared, evaluated.unjudged = targets, compared, unjudged
    _judge(evaluated, judges)
    evaluated.speed = _speed(model, evaluated, arguments, output_dir / "answers" / "speed.json")
    write_rows(output_dir / "predictions.parquet", table_rows(list(evaluated.modes.values())), SCHEMA)
    if arguments.backbone:
        logger.info("Perplexity, the model's and that of %s", arguments.backbone)
        evaluated.collapse = perplexity_report(model, arguments.backbone, task)
    sections = {}
    for name, compute in SECTIONS.items():
        logger.info("Computing %s", name)
        sections[name] = compute(evaluated)
    sections = {name: section for name, section in sections.items() if section is not None}
    metrics = _record(model, task, evaluated, arguments, argv) | {name: s.numbers for name, s in sections.items()}
    _write(output_dir, evaluated, sections, metrics, task)
    return metrics


def _predicted(
    model: Any, task: Task, asked: RowsToAsk, arguments: EvaluationArguments, output_dir: Path
) -> Evaluated:
    """Asks the model about every row that a section needs."""

    def answers(rows: LabelledTexts, mode: str, known: dict[int, dict[str, Any]] | None = None) -> pd.DataFrame:
        lengths = (arguments.batch_size, arguments.max_new_tokens)
        return predict(model, rows, mode, output_dir / "answers", arguments.overwrite, *lengths, known)

    config = model.config  # that of a checkpoint of format 1 lacks what came later
    weight = getattr(config, "lm_reading_weight", 0.0)
    free_is_held = bool(weight) or getattr(config, "explanation_guidance_scale", 1.0) != 1
    labels = tuple(config.label_names)
    found: dict[str, pd.DataFrame] = {}
    for mode in sorted(arguments.modes):  # free ones first, of which most are the guided ones too
        known = known_when_guided(found["free"], labels) if found and free_is_held else None
        found[mode] = answers(asked.reported, mode, known)
    return Evaluated(
        asked.reported,
        {mode: found[mode] for mode in arguments.modes},
        config.threshold, labels, weight, free_is_held,
        asked=task.asked,
        verdicts=tuple(task.prompt["verdicts"]),
        relation=relation(model, task, arguments.split),
        validation=None if asked.validation is None else answers(asked.validation, "none"),
        validation_relation=relation(model, task, "validation"),
        others={name: answers(rows, "none") for name, rows in asked.others.items()},
        examples=arguments.examples,
        samples=arguments.bootstrap_samples,
        seed=arguments.seed,
    )  # fmt: skip


def _judges(task: Task, arguments: EvaluationArguments, folder: Path) -> tuple[list[Judge], dict[str, str]]:
    """The judges that were asked for; the default ones may lack explanations to learn from, for a reason by name."""
    if arguments.modes == ["none"]:
        return [], {}
    if arguments.judges == list(DEFAULT_JUDGES):
        return default_judges(task)
    return [make_judge(spec, task, folder) for spec in arguments.judges], {}


def _judge(evaluated: Evaluated, judges: list[Judge]) -> None:
    """Has the explanations judged, by mode; the first judge's reading joins the answers."""
    for mode, frame in evaluated.explained.items():
        reports = {judge.name: alignment_report(frame, judge) for judge in judges}
        if reports:
            evaluated.alignment[mode] = reports
            first = next(iter(reports.values()))
            frame["judged_probability"] = pd.array(first["judged_probability"], dtype="Float64")
            frame["judged_label"] = pd.array(first["judged_label"], dtype="Int64")


def _speed(model: Any, evaluated: Evaluated, arguments: EvaluationArguments, kept: Path) -> dict[str, Any]:
    """What an earlier run measured, if it was of the same; else [`speed_report`], which asks the model again."""
    mode = next(iter(evaluated.explained), None)
    asked = asked_of(model, evaluated.rows, mode or "none", arguments.max_new_tokens)
    of = {**asked, "batch_size": arguments.batch_size}
    found = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() and not arguments.overwrite else {}
    if found.get("of") != of:
        lengths = (arguments.batch_size, arguments.max_new_tokens)
        found = {"of": of, "speed": speed_report(model, evaluated.rows.texts, mode, *lengths)}
        write_json(kept, found)
    return found["speed"]


def _checked(name: str, theirs: pd.DataFrame, ours: LabelledTexts) -> pd.DataFrame:
    """Another system's predictions, after checking that they are of the same rows."""
    gold = pd.Series(ours.gold, index=ours.ids)
    shared = [row_id for row_id in gold.index if row_id in theirs.index]
    if not shared:
        raise ValueError(f"{name}: none of its ids is one of the {len(gold)} evaluated rows.")
    if len(shared) < len(gold):
        logger.warning("%s: compared on %d of %d rows; it lacks the others.", name, len(shared), len(gold))
    told = theirs.loc[shared, "gold"].dropna() if "gold" in theirs else gold[:0]
    if (told != gold[told.index]).any():
        raise ValueError(f"{name}: its gold labels are not those of this task; these are other rows.")
    if "predicted" not in theirs:
        logger.warning("%s has no column `predicted`: its decisions are taken at 0.5.", name)
        theirs = theirs.assign(predicted=(theirs["probability"] >= 0.5).astype(int))
    return theirs


def _record(
    model: Any, task: Task, evaluated: Evaluated, arguments: EvaluationArguments, argv: list[str] | None
) -> dict[str, Any]:
    gold = evaluated.numbers["gold"]
    return {
        "task": task.name,
        "split": arguments.split,
        "model": arguments.model,
        "revision": getattr(model.config, "_commit_hash", None),
        "threshold": evaluated.threshold,
        "labels": {"model": list(evaluated.labels), "task": list(task.labels)},
        "rows": {
            "reported": len(gold),
            "positive": int(gold.sum()),
            "unlabelled": evaluated.rows.unlabelled,
            "truncated": int(evaluated.numbers["truncated"].sum()),
        },
        "modes": arguments.modes,
        "arguments": json.loads(without_secrets(json.dumps(asdict(arguments)))),
        **describe_run("evaluate_clsgen.py", argv or []),
    }


def _write(
    output_dir: Path, evaluated: Evaluated, sections: dict[str, Section], metrics: dict[str, Any], task: Task
) -> None:
    report = _report(evaluated, sections, metrics, task)
    for plot in report.plots:
        write_text(output_dir / "plots" / f"{plot.name}.svg", plot.svg)
    write_text(output_dir / "report.html", report.to_html())
    write_text(output_dir / "report.md", report.to_markdown("plots"))
    write_json(output_dir / "metrics.json", metrics)


def _report(evaluated: Evaluated, sections: dict[str, Section], metrics: dict[str, Any], task: Task) -> Report:
    scores = sections["classification"].numbers
    headline = [(name, number(scores[key]["value"]), spread(scores[key])) for key, name in HEADLINE.items()]
    for mode, judges in evaluated.alignment.items():
        judge = next(iter(judges))
        estimate = sections["alignment"].numbers[mode][judge]["with_intervals"]["auroc_alignment"]
        headline.append((f"AUROC-alignment, {mode}", number(estimate["value"]), spread(estimate)))
    rows = metrics["rows"]
    told = [f"{rows['reported']} rows, {rows['positive']} of label 1 ({task.labels[1]})"]
    if rows["unlabelled"]:
        told.append(f"{rows['unlabelled']} rows without a label left out")
    if rows["truncated"]:
        told.append(f"{rows['truncated']} texts truncated")
    if metrics["arguments"]["limit"]:
        told.append(f"limited to {metrics['arguments']['limit']} rows of each split")
    if list(evaluated.labels) != list(task.labels):
        told.append(f"the model's labels are {evaluated.labels}, the task's {tuple(task.labels)}")
    if task.credentialed:
        told.append("holds text of a credentialed source: not to be published")
    return Report(
        title=f"CLSGen on {task.name}, {metrics['split']} split",
        subtitle="; ".join(told),
        question=task.prompt["question"],
        headline=headline,
        parts=[section.part for section in sections.values()],
        facts={
            "model": f"{metrics['model']} {metrics['revision'] or ''}".strip(),
            "command": metrics["command"],
            "code": str(metrics["commit"]),
            "versions": ", ".join(f"{name} {found}" for name, found in metrics["versions"].items()),
            "threshold": f"{evaluated.threshold:.4f}, stored in the model",
            "bootstrap": f"{evaluated.samples} samples, seed {evaluated.seed}",
        },
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; see the module's docstring. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "datasets", "matplotlib", "fontTools"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        arguments = HfArgumentParser(EvaluationArguments).parse_args_into_dataclasses(argv)[0]
        metrics = evaluate_checkpoint(arguments, argv)
    except KeyboardInterrupt:
        logger.error("Interrupted. The same command goes on from here.")
        return 130
    except (OSError, ValueError) as error:
        logger.error("%s", error)
        return 1
    output_dir = Path(arguments.output_dir or Path("outputs") / metrics["task"] / "evaluation")
    for key, name in HEADLINE.items():
        estimate = metrics["classification"][key]
        logger.info("%-18s %s (%s)", name, number(estimate["value"]), spread(estimate))
    logger.info("Report: %s", output_dir / "report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
