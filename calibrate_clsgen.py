"""Fits a finished checkpoint's number to a validation split anew; its weights stay as they are.

python calibrate_clsgen.py --model outputs/trial_claims/model --output outputs/pooled --lm_reading_weight 0.5
python calibrate_clsgen.py --model NAMESPACE/NAME --output outputs/here --task trial_claims_here

The second form is for another place than the one that the checkpoint's rows come from: the task's folder, copied, with
rows from there in its validation split.
"""

import json
import logging
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser
from transformers.utils import cached_file

from clsgen.atomic_io import write_json
from clsgen.checkpoint_folder import write_checkpoint
from clsgen.modeling_clsgen import ClsGenForCausalLMAndClassification
from clsgen.prompting_clsgen import TaskPrompt
from clsgen.run_record import describe_run
from clsgen.scoring import (
    SCORED,
    CalibrationArguments,
    calibrate_and_test,
    check_validation_split,
    logits_and_labels,
    table,
)
from clsgen.tasks import Task, load_task, rows_that_fit


@dataclass(kw_only=True)
class RecalibrationArguments(CalibrationArguments):
    """Which checkpoint, on which rows, and where to write it."""

    model: str = field(metadata={"help": "A CLSGen checkpoint: a folder or a Hub id."})
    output: str = field(metadata={"help": "The new checkpoint's folder; may be the old one's."})
    revision: str | None = field(default=None, metadata={"help": "Commit of the Hub repository."})
    task: str | None = field(
        default=None, metadata={"help": "The task's folder, or its name below data/; default: the checkpoint's own."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Source that the task's prepare.py reads."})
    on_bad_row: str = field(
        default="error", metadata={"help": "A row that cannot be used stops the run, or is skipped and counted.",
                                   "choices": ["error", "skip"]}
    )  # fmt: skip
    results_dir: str | None = field(default=None, metadata={"help": "A further folder for metrics and predictions."})


def recalibrate(arguments: RecalibrationArguments, argv: list[str] | None = None) -> dict[str, Any]:
    """Writes the checkpoint with a new calibration, threshold and prediction sets.

    Args:
        arguments ([`RecalibrationArguments`]): What to do.
        argv (`list[str]`, *optional*): The command line, for the record.

    Returns:
        `dict`: The checkpoint's `metrics.json`: what it said of the training, with the splits' new numbers, and
        under `recalibration` what they come from.

    Raises:
        ValueError, OSError: for a checkpoint, a task or rows that can't be used; nothing is written then.
    """
    try:
        Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"`--output` {arguments.output} is not writable ({error}): choose another.") from error
    former = json.loads(_read(arguments, "metrics.json"))
    recipe = _read(arguments, "recipe.yaml", needed=False)
    task = load_task(arguments.task or former["task"], arguments.data_dir, arguments.on_bad_row)
    model = ClsGenForCausalLMAndClassification.from_pretrained(
        arguments.model, revision=arguments.revision, device_map="auto"
    )
    _check(task, former, model)
    task = rows_that_fit(task, model.encoder, arguments.on_bad_row)
    check_validation_split(task)
    arguments = replace(arguments, threshold_method=arguments.threshold_method or former.get("threshold_method"))
    metrics, predictions = calibrate_and_test(
        model.config, task, lambda _, rows: logits_and_labels(model, rows), arguments
    )
    report = {name: value for name, value in former.items() if name not in SCORED}
    report |= {**metrics, "credentialed": former.get("credentialed", False) or task.credentialed}
    report["recalibration"] = describe_run("calibrate_clsgen.py", argv or [])
    write_checkpoint(model, arguments.output, report, predictions, recipe)
    if arguments.results_dir:
        write_json(Path(arguments.results_dir) / "metrics.json", report)
        write_json(Path(arguments.results_dir) / "test_predictions.json", predictions)
    return report


def _read(arguments: RecalibrationArguments, name: str, needed: bool = True) -> str | None:
    """The text of one of the checkpoint's files; `None` where it has no such, unless it is `needed`."""
    path = cached_file(
        arguments.model, name, revision=arguments.revision, _raise_exceptions_for_missing_entries=needed
    )
    return None if path is None else Path(path).read_text(encoding="utf-8")


def _check(task: Task, former: dict[str, Any], model: ClsGenForCausalLMAndClassification) -> None:
    if task.name != former["task"] or set(task.fields) != set(model.encoder.prompt.fields):
        raise ValueError(
            f"The checkpoint answers the task {former['task']!r}, with the fields {model.encoder.prompt.fields}; "
            f"these are rows of {task.name!r}, with {task.fields}. For rows of your own, copy the task's folder and "
            "replace its validation split (and test split)."
        )
    if list(task.labels) != model.config.label_names:
        raise ValueError(
            f"The checkpoint's labels 0 and 1 are {model.config.label_names}, those of {task.name!r} {task.labels}: "
            "name them alike in its task.yaml, if they mean the same in the same order."
        )
    asked, answered = TaskPrompt.from_dict(task.prompt), model.encoder.prompt
    differ = [each.name for each in fields(asked) if getattr(asked, each.name) != getattr(answered, each.name)]
    if differ:
        raise ValueError(
            f"The checkpoint was trained with another {', '.join(differ)} than {task.name!r} has now: its answers are "
            "to that question. Take the task.yaml that it was trained with, or train anew."
        )
    if "validation" not in task.splits:
        raise ValueError(f"The task {task.name!r} has no validation split: there is nothing to calibrate on.")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; see the module's docstring. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        arguments = HfArgumentParser(RecalibrationArguments).parse_args_into_dataclasses(argv)[0]
        report = recalibrate(arguments, argv)
    except (OSError, ValueError) as error:
        sys.exit(f"calibrate_clsgen.py: {error}")
    print(f"\n{table(report)}\n\n{arguments.output}: threshold {report['threshold']:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
