"""Which rows an evaluation asks the model about, found and checked before any of them is asked."""

import logging
from dataclasses import dataclass, replace
from typing import Any

from clsgen.evaluation.evaluated import CALIBRATED_ON, TRAINED_ON
from clsgen.evaluation.predictions import LabelledTexts, labelled_texts
from clsgen.prompting_clsgen import TaskPrompt
from clsgen.tasks import Task

logger = logging.getLogger("clsgen.evaluate_clsgen")


@dataclass(frozen=True)
class RowsToAsk:
    """The rows of an evaluation.

    Args:
        reported ([`LabelledTexts`]): Of the split that is reported.
        validation ([`LabelledTexts`], *optional*): What thresholds are fitted on, if that is another split.
        others (`dict[str, LabelledTexts]`): Of other data, by their name and what they are to the model.
    """

    reported: LabelledTexts
    validation: LabelledTexts | None
    others: dict[str, LabelledTexts]


def rows_to_ask(
    model: Any, task: Task, other_tasks: dict[str, Task], split: str, limit: int | None = None, seed: int = 0
) -> RowsToAsk:
    """The rows of an evaluation of a model on a task's split.

    Args:
        model ([`ClsGenForCausalLMAndClassification`]): The model.
        task ([`Task`]): Reported.
        other_tasks (`dict[str, Task]`): Calibration is reported on these too, by what the caller calls them, which
            names those apart that have the same name.
        split (`str`): The one that is reported.
        limit (`int`, *optional*), seed (`int`): See [`labelled_texts`].

    Raises:
        ValueError: for a task with the model's labels the other way round, or without labelled rows.
    """
    for each in (task, *other_tasks.values()):
        _check_labels(model, each)
    fields = model.encoder.prompt.fields
    names, others = [each.name for each in (task, *other_tasks.values())], {}
    for given, other in other_tasks.items():
        of_split = "test" if "test" in other.splits else "train"
        rows = labelled_texts(other, of_split, fields, limit, seed)
        if names.count(other.name) > 1:
            rows = replace(rows, name=f"also_on {given}/{of_split}")
        others[f"{rows.name} ({relation(model, other, of_split)})"] = rows
    validation = None
    if "validation" in task.splits and split != "validation":
        validation = labelled_texts(task, "validation", fields, limit, seed)
    return RowsToAsk(labelled_texts(task, split, fields, limit, seed), validation, others)


def _check_labels(model: Any, task: Task) -> None:
    ours, theirs = tuple(model.config.label_names), tuple(task.labels)
    if ours == theirs[::-1]:
        raise ValueError(
            f"The labels of {task.name} are the model's the other way round: {theirs}, and the model's label 0 is "
            f"{ours[0]!r}. Every number would be upside down: turn them and the `label` column round in the task."
        )
    if ours != theirs:
        logger.warning("The model's labels are %s, those of %s %s.", ours, task.name, theirs)


def relation(model: Any, task: Task, split: str) -> str:
    """What a split is to the model, as far as its config tells."""
    if TaskPrompt.from_dict(model.config.prompt) != TaskPrompt.from_dict(task.prompt):
        return "of another task than the model's"
    return {"train": TRAINED_ON, "validation": CALIBRATED_ON, "test": "not seen"}[split]
