"""Writes the built task: a folder that `load_task` reads, `train_sft_cls.py` trains from and the Hub shows."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from datasets import ClassLabel, Dataset, DatasetInfo, Features, SplitDict, SplitInfo, Value
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard, DatasetCardData

from clsgen.atomic_io import write_json, write_text
from clsgen.explanations.judging import Judged
from clsgen.table_files import write_rows
from clsgen.tasks import Task

TEMPLATE = Path(__file__).with_name("card_template.md")
REPORT, REJECTED = "report.json", "rejected.jsonl"
# What becomes of a filtered row: the head alone learns from it, it leaves the training split, or it keeps its words.
HEAD, DROP, EXPLAIN = "head", "drop", "explain"
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (math.inf, "n>100K"))


def features_of(task: Task) -> Features:
    """Columns of the built data."""
    texts = ["explanation", "teacher_verdict", "protocol", "filter", "filter_reason"]
    return Features(
        {"id": Value("string"), **{name: Value("string") for name in task.fields}}
        | {"label": ClassLabel(names=list(task.labels)), "teacher_probability": Value("float64")}
        | {name: Value("string") for name in texts}
    )


def output_rows(judged: Iterable[Judged], task: Task, filtered_rows: str = HEAD) -> dict[str, list[dict[str, Any]]]:
    """Rows by split. Only `drop` leaves rows out, and only of the training split."""
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in task.splits}
    for each in judged:
        if filtered_rows == DROP and each.split == "train" and each.asked and not each.kept:
            continue
        label, finding = each.row["label"], each.findings[0] if each.findings else None
        splits[each.split].append(
            {"id": each.row["id"], **{name: each.row[name] for name in task.fields}}
            | {
                "label": None if label is None else int(label),
                "explanation": each.explanation if each.kept or filtered_rows == EXPLAIN else None,
                "teacher_verdict": None if each.verdict is None else task.labels[each.verdict],
                "teacher_probability": each.probability,
                "protocol": each.protocol,
                "filter": finding.filter if finding else None,
                "filter_reason": "; ".join(found.reason for found in each.findings) or None,
            }
        )
    return splits


def write_task(
    folder: Path, task: Task, judged: list[Judged], report: dict[str, Any], filtered_rows: str, file_format: str
) -> None:
    """Writes data, rejected explanations, report, card and, last, `task.yaml`; each file is there whole or not at all.

    Args:
        folder (`Path`): Where they go.
        task (`Task`): The source.
        judged (`list[Judged]`): All of its rows.
        report (`dict`): The run's; see [`build_explanations.build`].
        filtered_rows (`str`): `head`, `drop` or `explain`.
        file_format (`str`): `parquet` or `jsonl`.
    """
    (folder / "task.yaml").unlink(missing_ok=True)  # an earlier build's would make a task of the two together
    features, splits = features_of(task), output_rows(judged, task, filtered_rows)
    data_files = {split: f"{split}.{file_format}" for split in splits}
    infos = {}
    for split, rows in splits.items():
        table = Dataset.from_list(rows, features=features)
        schema = features.arrow_schema if file_format == "parquet" else None
        write_rows(folder / data_files[split], table, schema)
        infos[split] = SplitInfo(split, num_bytes=table.data.nbytes, num_examples=len(table))
    write_rows(folder / REJECTED, _rejected(judged))
    write_json(folder / REPORT, report)
    write_text(folder / "README.md", str(render_card(folder, task, report, data_files, features, infos)))
    spec = {"name": task.name, **task.prompt, "labels": list(task.labels), "data_files": data_files}
    spec |= {"license": task.license} if task.license else {}
    spec |= {"credentialed": True} if task.credentialed else {}
    write_text(folder / "task.yaml", yaml.safe_dump(spec, sort_keys=False, allow_unicode=True))


def _rejected(judged: Iterable[Judged]) -> Iterable[dict[str, Any]]:
    for each in judged:
        if each.asked and each.findings:
            yield {
                "id": each.row["id"], "split": each.split, "protocol": each.protocol,
                "filters": [finding.filter for finding in each.findings],
                "reasons": [finding.reason for finding in each.findings], "explanation": each.explanation,
            }  # fmt: skip


def render_card(
    folder: Path, task: Task, report: dict[str, Any], data_files: dict[str, str], features: Features,
    infos: dict[str, SplitInfo],
) -> DatasetCard:  # fmt: skip
    """The dataset card: metadata that the Hub reads, and how the data came about."""
    rows = sum(info.num_examples for info in infos.values())
    size = next(name for most, name in _SIZES if rows < most)
    paths = [{"split": split, "path": path} for split, path in data_files.items()]
    data = DatasetCardData(
        language=report["filters"]["language"],
        license=task.license or "unknown",
        pretty_name=f"{task.name}, with a teacher's explanations",
        size_categories=size,
        task_categories=["text-classification", "text-generation"],
        tags=["explanations", "synthetic", "clsgen"],
        configs=[{"config_name": "default", "data_files": paths}],
    )
    info_splits = SplitDict()
    for info in infos.values():
        info_splits.add(info)
    files = sum((folder / path).stat().st_size for path in data_files.values())
    info = DatasetInfo(
        features=features,
        splits=info_splits,
        download_size=files,
        dataset_size=sum(i.num_bytes for i in infos.values()),
    )
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    return DatasetCard.from_template(
        data, template_path=str(TEMPLATE), task=task, report=report, splits=infos, fields=task.fields
    )
