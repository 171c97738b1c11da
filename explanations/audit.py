"""Filters held against a person's word: which rows they refuse wrongly."""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from clsgen.explanations.judging import SOURCE, Judged
from clsgen.table_files import read_rows

SHOULD_BE = ("kept", "filtered")


def sample_for_audit(judged: Iterable[Judged], most: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows for a person to judge: `most` filtered and `most` kept ones, drawn at random.

    The person fills in `should_be` (`kept` or `filtered`) and `why`.
    """
    groups: dict[bool, list[Judged]] = {False: [], True: []}
    for each in judged:
        if each.explanation is not None and each.protocol != SOURCE:
            groups[each.kept].append(each)
    draw = random.Random(seed)
    drawn = [each for kept in groups for each in draw.sample(groups[kept], min(most, len(groups[kept])))]
    return [
        {
            "id": each.row["id"], "split": each.split, "label": int(each.row["label"]),
            "filter": each.findings[0].filter if each.findings else None, "should_be": None, "why": None,
        }
        for each in drawn
    ]  # fmt: skip


def read_audit(path: Path) -> dict[str, str]:
    """What a person says of rows, by id: `kept` or `filtered`.

    Raises:
        ValueError: for a line that says something else.
    """
    found = {}
    for number, line in enumerate(read_rows(path), start=1):
        if line.get("should_be") not in SHOULD_BE or not line.get("id"):
            raise ValueError(f"{path}, row {number}: `id` and `should_be` ({' or '.join(SHOULD_BE)}) are needed.")
        found[str(line["id"])] = line["should_be"]
    return found


def filter_errors(audit: dict[str, str], judged: Iterable[Judged], filters: Iterable[str]) -> dict[str, dict]:
    """How often each filter is wrong on the hand-checked rows.

    Returns:
        `dict[str, dict]` by filter: `checked` rows that it refuses and how many of them `wrongly`; `good` rows, those
        that a person would keep; `false_positive_rate`, wrongly / good, with its 95% Wilson interval.
    """
    rows = [each for each in judged if each.row["id"] in audit and each.explanation is not None]
    good = sum(audit[each.row["id"]] == "kept" for each in rows)
    errors = {}
    for name in filters:
        flagged = [each for each in rows if name in {finding.filter for finding in each.findings}]
        wrongly = sum(audit[each.row["id"]] == "kept" for each in flagged)
        interval = binomtest(wrongly, good).proportion_ci(method="wilson") if good else (0.0, 1.0)
        errors[name] = {
            "checked": len(flagged), "wrongly": wrongly, "good": good,
            "false_positive_rate": wrongly / good if good else float("nan"),
            "interval": [round(float(bound), 4) for bound in interval],
        }  # fmt: skip
    return errors


def kept_errors(audit: dict[str, str], judged: Iterable[Judged]) -> dict[str, int]:
    """Of the kept rows that a person has seen, how many they would not keep."""
    rows = [each for each in judged if each.kept and each.row["id"] in audit]
    return {"checked": len(rows), "wrongly": sum(audit[each.row["id"]] == "filtered" for each in rows)}
