"""Builds a training set with explanations: a teacher writes them, filters check them, no row goes missing unsaid.

python build_explanations.py --task my_task --base_url http://localhost:8000/v1 --model my-teacher --dry_run true
python build_explanations.py --task my_task --base_url http://localhost:8000/v1 --model my-teacher
python build_explanations.py --task clinifact --data_dir CliniFact --answers data/clinifact/explanations.jsonl \\
    --answers_id "{nctId}-{PMID}-{index}"
"""

import asyncio
import json
import logging
import re
import shlex
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from clsgen.atomic_io import write_json
from clsgen.explanations.answers import AnswerStore
from clsgen.explanations.audit import filter_errors, kept_errors, read_audit, sample_for_audit
from clsgen.explanations.collecting import BLIND_THEN_LABEL, PROTOCOLS, Collected, collect, estimate
from clsgen.explanations.filters import FilterArguments
from clsgen.explanations.judging import (
    Judged,
    all_findings,
    check_floor,
    class_ledger,
    judge_task,
    teacher_quality,
)
from clsgen.explanations.protocols import BLIND, Asker
from clsgen.explanations.recorded import read_recorded
from clsgen.explanations.task_folder import DROP, EXPLAIN, HEAD, REPORT, write_task
from clsgen.explanations.teacher import TeacherArguments, TeacherError
from clsgen.run_record import without_secrets
from clsgen.table_files import write_rows
from clsgen.tasks import Task, find_task, load_task

logger = logging.getLogger("clsgen.build_explanations")
ANSWERS, FAILED_REPORT = ".teacher_answers.jsonl", "failed_report.json"


@dataclass
class BuildArguments:
    """What to explain, and what becomes of the answers."""

    task: str = field(metadata={"help": "A task's folder, or its name below data/."})
    data_dir: str | None = field(default=None, metadata={"help": "Source that the task's prepare.py reads."})
    on_bad_row: str = field(
        default="error", metadata={"help": "A row that cannot be used stops the run, or is skipped and counted.",
                                   "choices": ["error", "skip"]}
    )  # fmt: skip
    output_dir: str | None = field(
        default=None, metadata={"help": "The new task folder; outputs/<task>_explained by default."}
    )
    protocol: str = field(
        default=BLIND_THEN_LABEL, metadata={"help": "Ask without the label, with it, or first without and then, where "
                                                    "the verdict disagrees, with it.", "choices": list(PROTOCOLS)}
    )  # fmt: skip
    splits: list[str] = field(
        default_factory=lambda: ["train", "validation"], metadata={"help": "Ask about rows of these splits."}
    )
    limit: int | None = field(default=None, metadata={"help": "Ask about so many rows at most, the first ones."})
    filtered_rows: str = field(
        default=HEAD, metadata={"help": "A filtered row trains the head alone, leaves the training split, or keeps "
                                        "its explanation.", "choices": [HEAD, DROP, EXPLAIN]}
    )  # fmt: skip
    keep_source_explanations: bool = field(
        default=False, metadata={"help": "Leave rows alone that have an explanation already."}
    )
    min_kept_per_class: int = field(
        default=1, metadata={"help": "The build fails where a class of the training split keeps fewer explanations."}
    )
    answers: str | None = field(
        default=None, metadata={"help": "A file with teacher_verdict, teacher_probability and explanation, in the "
                                        "place of a teacher (the protocol is then `blind`)."}
    )  # fmt: skip
    answers_id: str = field(default="{id}", metadata={"help": "The row's id, from that file's columns."})
    answers_teacher: str = field(default="a large language model", metadata={"help": "Who gave them, for the card."})
    file_format: str = field(default="parquet", metadata={"help": "Of the data.", "choices": ["parquet", "jsonl"]})
    audit: str | None = field(
        default=None, metadata={"help": "Rows that a person has judged: adds the filters' error rates to the card."}
    )
    audit_sample: int | None = field(
        default=None, metadata={"help": "Draw so many filtered and kept rows for a person into audit_sample.jsonl."}
    )
    results_dir: str | None = field(default=None, metadata={"help": "A further folder for the report."})
    dry_run: bool = field(default=False, metadata={"help": "Print requests, tokens and cost; ask and write nothing."})
    allow_unanswered: bool = field(
        default=False, metadata={"help": "Write the data although the teacher failed on some rows."}
    )
    allow_constant_teacher: bool = field(
        default=False, metadata={"help": "Go on with a teacher whose first verdicts are all the same."}
    )
    credentialed_data_may_leave: bool = field(
        default=False, metadata={"help": "You have the right to send this task's credentialed data to the teacher's "
                                         "endpoint."}
    )  # fmt: skip

    def __post_init__(self):
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"`limit` must be 1 or more, got {self.limit}.")
        if self.answers:
            self.protocol = BLIND


def output_folder(arguments: BuildArguments, task: Task) -> Path:
    """Where the new task goes; raises `ValueError` where its source is, or what this command has not built."""
    folder = Path(arguments.output_dir or Path("outputs") / f"{task.name}_explained")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file.")
    if folder.resolve() == find_task(arguments.task)[0].resolve():
        raise ValueError(f"{folder} is the source itself, which would be overwritten: name another --output_dir.")
    if (folder / "task.yaml").exists() and not (folder / REPORT).exists():
        raise ValueError(f"{folder} is a task that this command has not built: name another --output_dir.")
    return folder


def rows_to_ask(task: Task, arguments: BuildArguments) -> list[dict[str, Any]]:
    """Labelled rows of the chosen splits, in the order of the data."""
    unknown = sorted(set(arguments.splits) - set(task.splits))
    if "train" in unknown or (unknown and unknown != ["validation"]):
        raise ValueError(f"{task.name} has no split(s) {unknown}, only {list(task.splits)}.")
    rows = []
    for split in task.splits:
        for row in task.splits[split] if split in arguments.splits else ():
            if row["label"] is not None and not (arguments.keep_source_explanations and row["explanation"]):
                rows.append(row)
    rows = rows[: arguments.limit]
    explained = sum(row["explanation"] is not None for row in rows)
    if explained:
        logger.warning(
            "%d rows have an explanation already: the teacher's takes its place (--keep_source_explanations true "
            "leaves them).", explained,
        )  # fmt: skip
    return rows


def teacher_answers(
    task: Task, folder: Path, arguments: BuildArguments, teacher: TeacherArguments, language: str
) -> tuple[dict[str, Collected], dict[str, float]]:
    """What the teacher, or the file in its place, says of the rows; and what these answers took, in all runs."""
    rows = rows_to_ask(task, arguments)
    if arguments.answers:
        recorded, asked = read_recorded(Path(arguments.answers), task, arguments.answers_id), {r["id"] for r in rows}
        return {row_id: found for row_id, found in recorded.items() if row_id in asked}, {}
    store = AnswerStore(folder / ANSWERS)
    try:
        if len(store):
            logger.info("%s holds %d answers already: none of them is asked for again.", folder / ANSWERS, len(store))
        return asyncio.run(
            collect(
                rows, Asker(task, language), store, teacher, arguments.protocol,
                loopback_only=task.credentialed and not arguments.credentialed_data_may_leave,
                allow_constant_teacher=arguments.allow_constant_teacher,
            )
        )  # fmt: skip
    finally:
        store.close()


def dry_run(
    task: Task, folder: Path, arguments: BuildArguments, teacher: TeacherArguments, language: str
) -> dict[str, float]:
    """What asking would take, without what was answered before; nothing is written."""
    with tempfile.TemporaryDirectory() as nowhere:
        store = AnswerStore((folder if (folder / ANSWERS).exists() else Path(nowhere)) / ANSWERS)
        try:
            return estimate(rows_to_ask(task, arguments), Asker(task, language), store, teacher, arguments.protocol)
        finally:
            store.close()


def describe_teacher(arguments: BuildArguments, teacher: TeacherArguments) -> dict[str, Any]:
    """Who was asked and how, for the report; no address and no key."""
    if arguments.answers:
        return {"name": arguments.answers_teacher, "protocol": arguments.protocol, "answers": arguments.answers}
    named = {name: getattr(teacher, name) for name in ("temperature", "max_tokens", "request_seed", "max_reasks")}
    name = Path(teacher.model).name if Path(teacher.model).is_absolute() else teacher.model
    return {"name": name, "kind": teacher.teacher, "protocol": arguments.protocol, **named}


def describe(
    task: Task, judged: list[Judged], arguments: BuildArguments, teacher: TeacherArguments, filters: FilterArguments
) -> dict[str, Any]:
    """The report: who was asked, what was kept and why not, and how good the teacher and the filters are."""
    report = {
        "task": task.name,
        "teacher": describe_teacher(arguments, teacher),
        "filters": asdict(filters),
        "filtered_rows": arguments.filtered_rows,
        "ledger": class_ledger(judged, task.labels),
        "findings": all_findings(judged, task.labels),
        "teacher_quality": teacher_quality(judged),
    }
    if arguments.audit:
        audit = read_audit(Path(arguments.audit))
        report["audit"] = {
            "rows": len(audit),
            "filters": filter_errors(audit, judged, filters.filters),
            "kept": kept_errors(audit, judged),
        }
    return report


def build(
    arguments: BuildArguments, teacher: TeacherArguments, filters: FilterArguments, command: str | None = None
) -> dict[str, Any]:
    """Builds a task folder with explanations; called again, it goes on where it was stopped.

    Args:
        arguments (`BuildArguments`): What to explain, and what becomes of the answers.
        teacher (`TeacherArguments`): Whom to ask.
        filters (`FilterArguments`): What to refuse.
        command (`str`, *optional*): For the report.

    Returns:
        `dict`: The report, which is also written as `report.json`; of a dry run, the estimate.

    Raises:
        TeacherError: The teacher cannot be asked. What it has answered is kept.
        ValueError: The task or an option cannot be used, the teacher failed on some rows, or a class falls below
            `min_kept_per_class`. Then the folder is left as it was, but for a `failed_report.json`.
    """
    task = load_task(arguments.task, arguments.data_dir, arguments.on_bad_row)
    folder = output_folder(arguments, task)
    if arguments.dry_run:
        return dry_run(task, folder, arguments, teacher, filters.language)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--output_dir {folder} cannot be made ({error}): choose another.") from error
    collected, usage = teacher_answers(task, folder, arguments, teacher, filters.language)
    judged = judge_task(task, collected, filters, arguments.keep_source_explanations)
    report = describe(task, judged, arguments, teacher, filters) | {"usage": usage, "command": command}
    unanswered = [found.unanswered for found in collected.values() if found.unanswered]
    if unanswered and not arguments.allow_unanswered:
        raise ValueError(
            f"The teacher failed on {len(unanswered)} row(s) ({unanswered[0]}). Call the same command again to ask "
            "about these; with `--allow_unanswered true` they stay without an explanation."
        )
    try:
        check_floor(report["ledger"], task.labels, arguments.min_kept_per_class)
    except ValueError:
        write_json(folder / FAILED_REPORT, report)  # an earlier build's stays with its data
        raise
    (folder / FAILED_REPORT).unlink(missing_ok=True)
    if arguments.audit_sample:
        write_rows(folder / "audit_sample.jsonl", sample_for_audit(judged, arguments.audit_sample))
    write_task(folder, task, judged, report, arguments.filtered_rows, arguments.file_format)
    if arguments.results_dir:
        write_json(Path(arguments.results_dir) / REPORT, report)
    logger.info("%s: explained rows %s", folder, told(report["ledger"]))
    return report


def told(ledger: dict[str, Any]) -> str:
    """The ledger in one line."""
    return "; ".join(
        f"{split} " + ", ".join(f"{counts['kept'] + counts['from_source']} of {counts['rows']} {label}"
                                for label, counts in classes.items())
        for split, classes in ledger.items()
    )  # fmt: skip


def told_command(argv: list[str]) -> str:
    """The command line for the record, without the endpoint, whose address may hold a password, and without tokens."""
    command = shlex.join(["python", "build_explanations.py", *argv])
    return without_secrets(re.sub(r"(--base[_-]url)(=|\s+)('[^']*'|\S+)", r"\1\2...", command))


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; see the module's docstring. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "httpx2", "openai", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        parser = HfArgumentParser((BuildArguments, TeacherArguments, FilterArguments))
        arguments, teacher, filters = parser.parse_args_into_dataclasses(argv)
        report = build(arguments, teacher, filters, told_command(argv))
    except KeyboardInterrupt:
        logger.error("Interrupted. The same command goes on from here.")
        return 130
    except (OSError, ValueError, TeacherError) as error:
        logger.error("%s", error)
        return 1
    shown = report if arguments.dry_run else {name: report[name] for name in ("ledger", "teacher_quality")}
    print(json.dumps(shown, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
