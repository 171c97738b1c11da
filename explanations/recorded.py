"""Answers that a teacher gave elsewhere, from a file, in the place of a teacher."""

import logging
import re
from pathlib import Path

from clsgen.explanations.answers import Outcome
from clsgen.explanations.collecting import Collected
from clsgen.explanations.protocols import Answer
from clsgen.explanations.verdicts import contradict, parse_verdict
from clsgen.table_files import read_rows
from clsgen.tasks import Task

logger = logging.getLogger(__name__)


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
    names = (tuple(task.labels), tuple(task.prompt["verdicts"]))
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
        elif contradict(verdict, probability):
            found[row_id] = Collected(Outcome(None, "malformed", "verdict and probability contradict each other"))
        else:
            found[row_id] = Collected(Outcome(Answer(explanation.strip(), verdict, probability)))
    unused = set(found) - {row_id for split in task.splits.values() for row_id in split["id"]}
    if unused:
        logger.warning("%s: %d of %d answers are about no row of %s", path, len(unused), len(found), task.name)
    return found
