"""Which explanations are kept: what came of asking, held against the label and the filters; and the class ledger."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sklearn.metrics import cohen_kappa_score

from clsgen.classification_metrics import classification_metrics
from clsgen.explanations.collecting import Collected
from clsgen.explanations.filters import (
    NEAR_DUPLICATE,
    Candidate,
    FilterArguments,
    Finding,
    find_near_duplicates,
    find_problems,
)
from clsgen.explanations.protocols import BLIND, LABEL_CONDITIONED
from clsgen.tasks import Task

SOURCE, UNSUPPORTED = "source", "unsupported_by_text"
NOT_ASKED, UNANSWERED, UNLABELLED = "not_asked", "unanswered", "unlabelled"


@dataclass
class Judged:
    """A row, what the teacher said of it, and what speaks against using that.

    Args:
        split (`str`): Its split.
        row (`dict`): As [`tasks.load_task`] gives it.
        protocol (`str`, *optional*): By which the explanation came: `blind`, `label_conditioned`, or `source` where it
            stood in the data already.
        explanation (`str`, *optional*): Kept or not.
        verdict, probability: The blind ones.
        asked (`bool`): Whether the teacher was asked, or has an answer on file.
        findings (`list[Finding]`): Empty where the explanation is kept; the first is the row's reason.
    """

    split: str
    row: dict[str, Any]
    protocol: str | None = None
    explanation: str | None = None
    verdict: int | None = None
    probability: float | None = None
    asked: bool = False
    findings: list[Finding] = field(default_factory=list)

    @property
    def kept(self) -> bool:
        return self.explanation is not None and not self.findings

    @property
    def filters(self) -> set[str]:
        """Names of the filters that refuse it."""
        return {finding.filter for finding in self.findings}


def judge_task(
    task: Task, collected: dict[str, Collected], arguments: FilterArguments, keep_source: bool = False
) -> list[Judged]:
    """Judges all rows of a task, in their order.

    Args:
        task (`Task`): The rows.
        collected (`dict[str, Collected]`): What the teacher said, by the row's id.
        arguments (`FilterArguments`): The filters.
        keep_source (`bool`, *optional*, defaults to `False`): Leave explanations that the source has as they are;
            those of rows that the teacher was not asked about stay in any case.
    """
    judged = [
        _judge_row(task, split, row, collected.get(row["id"]), arguments, keep_source)
        for split, rows in task.splits.items()
        for row in rows
    ]
    if NEAR_DUPLICATE in arguments.filters:
        candidates = [(each.row["id"], each.explanation) for each in judged if each.kept and each.protocol != SOURCE]
        repeats = find_near_duplicates(candidates, arguments.near_duplicate_similarity)
        for each in judged:
            each.findings += [repeats[each.row["id"]]] if each.row["id"] in repeats else []
    return judged


def _judge_row(
    task: Task, split: str, row: dict[str, Any], found: Collected | None, arguments: FilterArguments, keep_source: bool
) -> Judged:
    if row["explanation"] is not None and (keep_source or row["label"] is None or found is None):
        return Judged(split, row, SOURCE, row["explanation"])
    if row["label"] is None:
        return Judged(split, row, findings=[Finding(UNLABELLED, "without a label no answer can be checked")])
    if found is None:
        return Judged(split, row, findings=[Finding(NOT_ASKED, "the teacher was not asked")])
    if found.unanswered is not None:
        return Judged(split, row, asked=True, findings=[Finding(UNANSWERED, found.unanswered)])
    blind = found.blind.answer if found.blind else None
    judged = Judged(split, row, asked=True)
    if blind is not None:
        judged.verdict, judged.probability = blind.verdict, blind.probability
    conditioned = found.conditioned
    outcome, judged.protocol = (conditioned, LABEL_CONDITIONED) if conditioned else (found.blind, BLIND)
    if outcome.answer is None:
        judged.findings.append(Finding(outcome.problem, outcome.detail))
        return judged
    judged.explanation = outcome.answer.explanation
    if not outcome.answer.supported_by_text:
        judged.findings.append(Finding(UNSUPPORTED, "told the label, the teacher finds no ground for it in the text"))
    candidate = Candidate(
        judged.explanation,
        f"{task.text_of(row)}\n{task.asked}",
        label=int(row["label"]),
        verdict=outcome.answer.verdict,
        label_names=task.labels,
    )
    judged.findings += find_problems(candidate, arguments)
    return judged


def class_ledger(judged: Iterable[Judged], labels: tuple[str, str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Counts by split and class: rows, asked, answered, kept (by protocol), and rejected by the first reason.

    `rows` is the sum of `kept`, `from_source`, `not_asked` and all of `rejected`.
    """
    names = {0.0: labels[0], 1.0: labels[1], None: UNLABELLED}
    ledger: dict[str, dict[str, dict[str, Any]]] = {}
    for each in judged:
        split = ledger.setdefault(each.split, {label: _no_counts() for label in labels})
        counts = split.setdefault(names[each.row["label"]], _no_counts())
        counts["rows"] += 1
        counts["asked"] += each.asked
        counts["answered"] += each.asked and (each.explanation is not None or each.verdict is not None)
        if not each.asked and each.protocol != SOURCE:
            counts["not_asked"] += 1
        elif not each.kept:
            counts["rejected"][each.findings[0].filter] += 1
        elif each.protocol == SOURCE:
            counts["from_source"] += 1
        else:
            counts["kept"] += 1
            counts[f"kept_{each.protocol}"] += 1
    for split in ledger.values():
        for counts in split.values():
            counts["rejected"] = dict(counts["rejected"].most_common())
    return ledger


def _no_counts() -> dict[str, Any]:
    numbers = ("rows", "asked", "answered", "kept", "kept_blind", "kept_label_conditioned", "from_source", "not_asked")
    return {**dict.fromkeys(numbers, 0), "rejected": Counter()}


def check_floor(ledger: dict[str, dict[str, dict[str, Any]]], labels: tuple[str, str], least: int) -> None:
    """Raises `ValueError` where a class of the training split keeps fewer explanations than `least`."""
    for label in labels:
        counts = ledger["train"][label]
        kept = counts["kept"] + counts["from_source"]
        if kept < least:
            raise ValueError(
                f"Only {kept} explanation(s) of {label!r} are kept in the training split, fewer than "
                f"--min_kept_per_class {least}. Rejected: {counts['rejected']}; not asked: {counts['not_asked']}. See "
                "failed_report.json; a better teacher, other filters or a lower floor would help."
            )


def all_findings(judged: Iterable[Judged], labels: tuple[str, str]) -> dict[str, dict[str, int]]:
    """Every filter's findings by class, also where it was not a row's first reason."""
    found: dict[str, dict[str, int]] = {}
    for each in judged:
        for name in each.filters if each.explanation is not None else ():
            by_class = found.setdefault(name, dict.fromkeys(labels, 0))
            by_class[labels[int(each.row["label"])]] += 1
    return found


def teacher_quality(judged: Iterable[Judged]) -> dict[str, dict[str, float]]:
    """The blind verdicts and probabilities against the gold labels, by split."""
    splits: dict[str, list[Judged]] = {}
    for each in judged:
        if each.verdict is not None and each.probability is not None and each.row["label"] is not None:
            splits.setdefault(each.split, []).append(each)
    quality = {}
    for split, rows in splits.items():
        gold = [int(each.row["label"]) for each in rows]
        verdicts = [each.verdict for each in rows]
        metrics = classification_metrics(gold, [each.probability for each in rows])
        agreement = sum(a == b for a, b in zip(gold, verdicts, strict=True)) / len(rows)
        kappa = float(cohen_kappa_score(gold, verdicts)) if len({*gold, *verdicts}) > 1 else float("nan")
        quality[split] = {"agreement": agreement, "kappa": kappa} | {
            name: metrics[name] for name in ("auroc", "brier", "ece", "rows", "positive")
        }
    return quality
