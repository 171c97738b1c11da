"""Answers that a teacher gave elsewhere, from a file, in the place of a teacher."""

import logging
import re
from pathlib import Path
from typing import Any

from clsgen.explanations.answers import Outcome
from clsgen.explanations.collecting import Collected
from clsgen.explanations.protocols import Answer
from clsgen.table_files import read_rows
from clsgen.tasks import Task

logger = logging.getLogger(__name__)
_VERDICTS = {"false": 0, "no": 0, "0": 0, "0.0": 0, "true": 1, "yes": 1, "1": 1, "1.0": 1}


def parse_verdict(value: Any, names: list[tuple[str, str]] = ()) -> int:
    """0 or 1, from a label's name, the words of a verdict, TRUE or FALSE, yes or no, 1 or 0.

    Args:
        value: As it stands in a file.
        names (`list[tuple[str, str]]`, *optional*): Pairs of names for label 0 and 1 that a task has of its own.

    Raises:
        ValueError: for anything else.
    """
    known = {**_VERDICTS, **{name.lower(): label for pair in names for label, name in enumerate(pair)}}
    found = known.get(str(value).strip().lower())
    if found is None:
        raise ValueError(f"the verdict is {value!r}; it must be one of {sorted(known)}.")
    return found


def read_recorded(path: Path, task: Task, id_template: str = "{id}") -> dict[str, Collected]:
    """Blind answers from a file with `teacher_verdict`, `teacher_probability` and `explanation`, by the row's id.

    Args:
        path (`Path`): CSV, JSONL or Parquet.
        task (`Task`): Whose rows they are about.
        id_template (`str`, *optional*, defaults to `"{id}"`): The id of the task's row, from the file's columns.

    Raises:
        ValueError: for a line without these columns, with an impossible value, or about a row that has one already.
    """
    found: dict[str, Collected] = {}
    names = [tuple(task.labels), tuple(task.prompt["verdicts"])]
    for number, line in enumerate(read_rows(path), start=1):
        try:
            row_id = re.sub(r"\{(\w+)\}", lambda match, line=line: str(line[match.group(1)]), id_template)
            probability = float(line["teacher_probability"])
            verdict, explanation = parse_verdict(line["teacher_verdict"], names), line["explanation"]
        except KeyError as error:
            raise ValueError(f"{path}, row {number} has no column {error}; it has {list(line)}.") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, row {number}: {error}") from error
        if not 0 <= probability <= 1:
            raise ValueError(f"{path}, row {number}: the probability is {probability}, not between 0 and 1.")
        if row_id in found:
            raise ValueError(f"{path}, row {number}: there is an answer about {row_id!r} already.")
        if not isinstance(explanation, str) or not explanation.strip():
            found[row_id] = Collected(Outcome(None, "malformed", "the explanation is empty"))
        else:
            found[row_id] = Collected(Outcome(Answer(explanation.strip(), verdict, probability)))
    unused = set(found) - {row_id for split in task.splits.values() for row_id in split["id"]}
    if unused:
        logger.warning("%s: %d of %d answers are about no row of %s", path, len(unused), len(found), task.name)
    return found
