"""Filters held against a person's word: which rows they refuse wrongly."""

import random
from collections import Counter
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
    """How often each filter is wrong, by the hand-checked rows.

    Filtered and kept rows are checked in other proportions than they have in the data, so each row stands for as many
    as its group (filtered or kept) has rows for each checked one.

    Returns:
        `dict[str, dict]` by filter: how many rows it `refuses`; how many of these are `checked`, and refused
        `wrongly`; the 95% Wilson interval of wrongly / checked; and `false_positive_rate`, the estimated share it
        refuses of all rows that a person would keep (`None` where none of what it refuses was checked).
    """
    explained = [each for each in judged if each.explanation is not None and each.protocol != SOURCE]
    checked = [each for each in explained if each.row["id"] in audit]
    sizes, seen = Counter(each.kept for each in explained), Counter(each.kept for each in checked)
    weights = {kept: sizes[kept] / seen[kept] for kept in seen}
    good = [each for each in checked if audit[each.row["id"]] == "kept"]
    errors = {}
    for name in filters:
        refuses = sum(name in each.filters for each in explained)
        found = sum(name in each.filters for each in checked)
        wrongly = [each for each in good if name in each.filters]
        interval = binomtest(len(wrongly), found).proportion_ci(method="wilson") if found else None
        known = good and (found or not refuses)
        errors[name] = {
            "refuses": refuses, "checked": found, "wrongly": len(wrongly),
            "interval": [round(float(bound), 3) for bound in interval] if interval else None,
            "false_positive_rate": _total(wrongly, weights) / _total(good, weights) if known else None,
        }  # fmt: skip
    return errors


def _total(rows: Iterable[Judged], weights: dict[bool, float]) -> float:
    return sum(weights[each.kept] for each in rows)


def kept_errors(audit: dict[str, str], judged: Iterable[Judged]) -> dict[str, int]:
    """Of the kept rows that a person has seen, how many they would not keep."""
    rows = [each for each in judged if each.kept and each.row["id"] in audit]
    return {"checked": len(rows), "wrongly": sum(audit[each.row["id"]] == "filtered" for each in rows)}
