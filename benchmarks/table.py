"""The side-by-side table, from result files alone: writes `results/table.csv` and `results/table.md`.

python -m benchmarks.table

A run is `results/<task>/<system>/metrics.json`, or one `seed-N/metrics.json` a seed; ablations lie one folder deeper.
What `evaluate_clsgen.py` says of a checkpoint's words is read from `evaluation/metrics.json` beside it
(`--output_dir`). A cell without a number in some file is empty, but for `texts_per_second`, the mean of what was
measured. `benchmarks/tried.csv` says what was tried against a shortfall, `benchmarks/table_notes.md` how to read it.
"""

import json
import logging
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.baselines.__main__ import SYSTEMS
from benchmarks.rivals import auroc_differences, no_worse
from clsgen.atomic_io import write_text
from clsgen.evaluation.predictions import read_predictions
from clsgen.evaluation.resampling import perfectly_calibrated_errors
from clsgen.table_files import read_rows, write_rows

logger = logging.getLogger("benchmarks.table")
RESULTS = Path(__file__).resolve().parent.parent / "results"
PAPER = Path(__file__).resolve().parent / "paper.csv"
TRIED = Path(__file__).resolve().parent / "tried.csv"
NOTES = Path(__file__).resolve().parent / "table_notes.md"
TASKS = ("trial_claims", "clinifact", "clinifact_evidence")
CHANCE_DRAWS = 2000
JUDGE = "tfidf"
JUDGE_OF_THE_REST = "tfidf-no-verdict"  # does not see the last sentence, where the verdict stands
MODES = ("free", "guided")
MUST_BE_BEATEN = "tfidf"  # where it is enough to be as good as the others
NEED_EXPLANATIONS = {"two-models"}  # without any, there is no second model: its first is `classification-only`
PER_MODE = ("auroc_alignment_mean", "kappa_mean", "rep4")
COLUMNS = (
    "task", "system", "mode", "seeds", "auroc_mean", "auroc_std", "average_precision_mean", "f1_mean", "brier_mean",
    "ece_mean", "auroc_alignment_mean", "kappa_mean", "contradiction_rate", "flesch_reading_ease", "rep4",
    "perplexity_general_ratio", "train_seconds", "texts_per_second", "ece_by_chance", "auroc_alignment_no_verdict",
    "judged_share", "judge_accuracy", "balanced_accuracy_mean",
)  # fmt: skip
# An evaluation scores in other batches than the run that it belongs to; the threshold is the same, up to a run on
# another machine.
SAME_AUROC, SAME_THRESHOLD = 0.005, 1e-4
SCORES = ("auroc", "average_precision", "f1", "balanced_accuracy", "brier", "ece")
# What each number of a CLSGen row must be, by mode ("" for each): a column, "at least" or "at most", and a limit.
TARGETS = (
    ("", "ece_mean", "at most", 0.08),
    ("free", "auroc_alignment_mean", "at least", 0.95),
    ("guided", "auroc_alignment_mean", "at least", 0.98),
    ("free", "kappa_mean", "at least", 0.70),
    ("guided", "kappa_mean", "at least", 0.90),
    ("", "perplexity_general_ratio", "at most", 1.10),
    ("", "rep4", "at most", 0.02),
)

Row = dict[str, Any]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, or an empty one where there is no such file; raises `ValueError` for what is not JSON."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}. Make it again by its command.") from error


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """The runs of a system on a task, each with its evaluation under `evaluation`, in the order of seeds."""
    seeds = sorted(folder.glob("seed-*"), key=lambda path: int(path.name.removeprefix("seed-")))
    runs = []
    for place in seeds or [folder]:
        run = read_json(place / "metrics.json")
        if "test" in run:
            evaluation = read_evaluation(place, run)
            runs.append({**run, "evaluation": evaluation, "ece_by_chance": ece_by_chance(place), "place": place})
    return runs


def read_evaluation(place: Path, run: dict[str, Any]) -> dict[str, Any]:
    """What `evaluate_clsgen.py` said of a run's checkpoint, or an empty object.

    Raises:
        ValueError: It is not of the whole test split, or of another checkpoint.
    """
    file = place / "evaluation" / "metrics.json"
    evaluation = read_json(file)
    if not evaluation:
        return {}
    if evaluation["split"] != "test" or evaluation["arguments"]["limit"] is not None:
        raise ValueError(f"{file} is not of the whole test split: the table has no place for it.")
    aurocs = run["test"]["auroc"], evaluation["classification"]["auroc"]["value"]
    thresholds = run.get("threshold"), evaluation.get("threshold")
    for name, (ours, theirs), most in (("AUROC", aurocs, SAME_AUROC), ("threshold", thresholds, SAME_THRESHOLD)):
        if None not in (ours, theirs) and abs(ours - theirs) > most:
            raise ValueError(f"{file} is of another checkpoint: its {name} is {theirs:.4f}, the run's {ours:.4f}.")
    return evaluation


def ece_by_chance(place: Path) -> float | None:
    """The mean calibration error that a perfectly calibrated model with a run's test probabilities would show."""
    file = place / "test_predictions.json"
    if not file.is_file():
        return None
    probabilities = read_predictions(file)["probability"].to_numpy()
    return float(perfectly_calibrated_errors(probabilities, CHANCE_DRAWS, seed=0).mean())


def find(run: dict[str, Any], *keys: str) -> float | None:
    """The number at these keys of a run, or else of its evaluation."""
    for value in (run, run["evaluation"]):
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, (int, float)):
            return float(value)
    return None


def find_first(run: dict[str, Any], *places: tuple[str, ...]) -> float | None:
    """The number at the first of these places that has one; systems keep the same number in different ones."""
    return next((value for keys in places if (value := find(run, *keys)) is not None), None)


def mean(values: Iterable[float | None]) -> float | None:
    """The mean over runs; `None` where a run lacks the number, for a mean over others would be of something else."""
    values = list(values)
    return statistics.fmean(values) if values and None not in values else None


def table_rows(results: Path, tasks: Iterable[str]) -> list[Row]:
    """The rows of the table: one a task, system and mode of explanation (empty for a system that writes none)."""
    rows = []
    for task in tasks:
        systems = sorted(path for path in (results / task).glob("*") if path.is_dir())
        found = [row for folder in systems for row in system_rows(task, folder)]
        rows += sorted(found, key=lambda row: (not is_clsgen(row), row["system"], row["mode"]))
        for folder in sorted((results / task / "ablations").glob("*")):
            rows += system_rows(task, folder, f"ablation-{folder.name}")
    return rows


def is_clsgen(row: Row) -> bool:
    """Whether a row is CLSGen's."""
    return row["system"].startswith("clsgen")


def system_rows(task: str, folder: Path, name: str | None = None) -> list[Row]:
    """The rows of one system on one task, under `name` or the system's own."""
    runs = read_runs(folder)
    if not runs:
        return []
    aurocs = [find(run, "test", "auroc") for run in runs]
    common: Row = dict.fromkeys(COLUMNS)
    # Baselines name themselves; a checkpoint's own report names its backbone.
    common |= {"task": task, "system": name or runs[0].get("system", f"clsgen-{folder.name}"), "seeds": len(runs)}
    common |= {f"{name}_mean": mean(find(run, "test", name) for run in runs) for name in SCORES}
    common["auroc_std"] = statistics.stdev(aurocs) if len(aurocs) > 1 and None not in aurocs else None
    common["perplexity_general_ratio"] = mean(find(run, "collapse", "general", "ratio") for run in runs)
    common["ece_by_chance"] = mean(find(run, "ece_by_chance") for run in runs)
    common["train_seconds"] = mean(find_first(run, ("train_seconds",), ("wall_seconds",)) for run in runs)
    rates = [find_first(run, ("texts_per_second",), ("speed", "texts_per_second")) for run in runs]
    common["texts_per_second"] = mean(rate for rate in rates if rate is not None)  # all seeds are as fast as one
    common["places"] = [run["place"] for run in runs]
    common["explained"] = mean(find(run, "train_rows", "explained") for run in runs)
    parts = [part for run in runs for part in (run, run["evaluation"])]
    modes = [mode for mode in MODES if any(mode in part.get("alignment", {}) for part in parts)]
    return [{**common, "mode": mode, **words_of(runs, mode)} for mode in modes] or [{**common, "mode": ""}]


def words_of(runs: list[dict[str, Any]], mode: str) -> Row:
    """What a row says of explanations."""
    places = {
        "auroc_alignment_mean": ("alignment", mode, JUDGE, "auroc_alignment"),
        "kappa_mean": ("alignment", mode, JUDGE, "kappa"),
        "contradiction_rate": ("alignment", mode, JUDGE, "contradiction_rate"),
        "auroc_alignment_no_verdict": ("alignment", mode, JUDGE_OF_THE_REST, "auroc_alignment"),
        "judge_accuracy": ("alignment", mode, JUDGE, "judge", "fitness", "accuracy"),
        "judge_fit": ("alignment", mode, JUDGE, "judge", "fitness", "fit"),
        "flesch_reading_ease": ("language", mode, "flesch_reading_ease"),
        "rep4": ("language", mode, "rep4"),
    }
    row = {column: mean(find(run, *keys) for run in runs) for column, keys in places.items()}
    judged, rows = (mean(find(run, "alignment", mode, JUDGE, key) for run in runs) for key in ("judged", "rows"))
    return {**row, "judged_share": judged / rows if rows else None}


def shortfalls(rows: list[Row], tried: Iterable[dict[str, str]] = ()) -> list[str]:
    """Where CLSGen's rows miss their targets, each in a sentence; a number that is missing is said to be.

    Args:
        rows: As [`table_rows`] gives them.
        tried: What was tried against it: `task`, `target` (as the sentence names it) and `tried`.
    """
    attempts = {(row["task"], row["target"]): f" Tried: {row['tried']}" for row in tried}
    found = []
    for ours, _ in contests(rows):
        task, system = ours[0]["task"], ours[0]["system"]
        for target, sentence in (*_missed_targets(ours), *_stronger_rivals(ours[0], rows), *_unfit_judges(ours)):
            found.append(f"{task}, {system}: {sentence}{attempts.get((task, target), '')}")
    return found


def contests(rows: list[Row]) -> Iterator[tuple[list[Row], list[Row]]]:
    """The rows of each CLSGen system on a task, and those of the baselines there."""
    for task, system in dict.fromkeys((row["task"], row["system"]) for row in rows if is_clsgen(row)):
        ours = [row for row in rows if (row["task"], row["system"]) == (task, system)]
        yield ours, [row for row in rows if row["task"] == task and row["system"] in SYSTEMS]


def _missed_targets(ours: list[Row]) -> Iterator[tuple[str, str]]:
    wordless = ours[0]["explained"] == 0
    if wordless:
        yield "explanations", "its training rows have no explanations, so it learned no words to be judged."
    for mode, column, side, limit in TARGETS:
        if wordless and column in PER_MODE:
            continue
        values = {row["mode"]: row[column] for row in ours if mode in ("", row["mode"])} or {mode: None}
        told = set()
        for of_mode, value in values.items():
            name = f"{column} ({of_mode})" if of_mode and column in PER_MODE else column
            if name in told:
                continue
            told.add(name)
            if value is None:
                yield name, f"no {name} yet; its target is {side} {limit:g}."
            elif value < limit if side == "at least" else value > limit:
                chance = ours[0]["ece_by_chance"] if column == "ece_mean" else None
                by_chance = "" if chance is None else f" (a perfectly calibrated model's: {chance:.3f})"
                yield name, f"{name} is {value:.3f}{by_chance}; its target is {side} {limit:g}."


def _stronger_rivals(ours: Row, rows: list[Row]) -> Iterator[tuple[str, str]]:
    aurocs = {row["system"]: row["auroc_mean"] for row in rows if row["task"] == ours["task"]}
    for rival in SYSTEMS:
        auroc = aurocs.get(rival)
        if None in (auroc, ours["auroc_mean"]):
            continue
        if auroc > ours["auroc_mean"] or (rival == MUST_BE_BEATEN and auroc == ours["auroc_mean"]):
            below = "below" if auroc > ours["auroc_mean"] else "no better than"
            yield "auroc_mean", f"AUROC {ours['auroc_mean']:.3f} is {below} the {auroc:.3f} of {rival}."
    rivals = [rival for rival in SYSTEMS if ours["explained"] != 0 or rival not in NEED_EXPLANATIONS]
    missing = [rival for rival in rivals if aurocs.get(rival) is None]
    if missing:
        yield "baselines", f"not compared with {', '.join(missing)}, which have not been measured here."


def _unfit_judges(ours: list[Row]) -> Iterator[tuple[str, str]]:
    for row in ours:
        if row.get("judge_fit") is not None and row["judge_fit"] < 1:
            accuracy = cell(row["judge_accuracy"])
            yield "judge", f"the judge {JUDGE} is unfit (its accuracy is {accuracy}): alignment by it means little."
            return


def cell(value: Any, digits: int = 3) -> str:
    """A value as the tables show it; empty for none."""
    return "" if value is None else f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def markdown(rows: list[Row]) -> str:
    """`table.md`: our numbers, where they fall short, each baseline against them, and the paper's, each apart."""
    digits = {"train_seconds": 1, "texts_per_second": 1, "flesch_reading_ease": 1}
    lines = [
        "# Side by side",
        "",
        NOTES.read_text(encoding="utf-8").rstrip(),
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(cell(row[name], digits.get(name, 3)) for name in COLUMNS) + " |" for row in rows),
        "",
        "## Where CLSGen falls short of its targets",
        "",
        *[f"- {sentence}" for sentence in shortfalls(rows, read_rows(TRIED))],
        "",
        "## What baselines do as well or better",
        "",
        *[f"- {sentence}" for contest in contests(rows) for sentence in no_worse(*contest)],
        "",
        "## CLSGen's AUROC less each baseline's",
        "",
        "Of the mean over seeds, on the same test rows: DeLong's paired test, p two-sided and not corrected for how "
        "many there are. Rows count as independent; those of CliniFact come from fewer trials (167 of `clinifact` "
        "from 158, 394 of `clinifact_evidence` from 303), which makes its intervals a little too narrow.",
        "",
        "| task | baseline | difference | 95% | p |",
        "|---|---|---|---|---|",
        *("| " + " | ".join(line) + " |" for contest in contests(rows) for line in auroc_differences(*contest)),
        "",
        "## The paper's numbers",
        "",
        "As the paper (arXiv 2604.11801) reports them, on Llama-3.1-8B-Instruct; not ours, and not comparable row by "
        "row.",
        "",
        "| data | system | metric | value |",
        "|---|---|---|---|",
        *("| " + " | ".join(row.values()) + " |" for row in read_rows(PAPER)),
    ]
    return "\n".join(lines) + "\n"


def write_tables(results: Path, tasks: Iterable[str]) -> int:
    """Writes `table.csv` and `table.md` into the folder of results; returns the number of rows.

    Raises:
        ValueError: There is no run of any task, or a result file is broken.
    """
    rows = table_rows(results, tasks)
    if not rows:
        raise ValueError(f"There are no result files of {list(tasks)} below {results}.")
    write_rows(results / "table.csv", ({name: cell(row[name], 6) for name in COLUMNS} for row in rows))
    write_text(results / "table.md", markdown(rows))
    return len(rows)


def main() -> None:
    """The command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        logger.info("results/table.csv and results/table.md: %d rows", write_tables(RESULTS, TASKS))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
