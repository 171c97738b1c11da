"""A task's data as they stand: in files, or in a data set on the Hub; each row with its place there."""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from clsgen.table_files import csv_rows, json_rows, open_text, parse_json

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Source:
    """The rows of one split as they are: where they come from, their columns, and each with its place there."""

    split: str
    origin: str
    columns: list[str]
    rows: Iterable[tuple[str, dict[str, Any]]]
    features: dict[str, Any] = field(default_factory=dict)  # where the data set says what its columns hold

    @classmethod
    def of(cls, split: str, origin: str, table: Dataset) -> "Source":
        return cls(split, origin, table.column_names, _placed(table), table.features)


def read_sources(folder: Path, spec: dict[str, Any]) -> Iterator[Source]:
    """The splits that a task has, in the order of `SPLITS`.

    Args:
        folder (`Path`): The task's, which its files are named from.
        spec (`dict`): Its `task.yaml`, checked.

    Raises:
        FileNotFoundError, ValueError: for a file or a split that is missing or can't be read, naming it.
    """
    if "dataset" in spec:
        loaded = load_dataset(spec["dataset"], spec.get("config_name"), revision=spec.get("revision"))
        if "train" not in loaded:
            raise ValueError(f"The data set {spec['dataset']} has no train split, only {list(loaded)}.")
        for split in SPLITS:
            if split in loaded:
                yield Source.of(split, f"{spec['dataset']}/{split}", loaded[split])
        return
    for split in SPLITS:
        if split in spec["data_files"]:
            path = folder / spec["data_files"][split]
            if not path.is_file():
                raise FileNotFoundError(f"{path}, the {split} split of {spec['name']!r}, is not there.")
            yield _load_file(path, split)


def _placed(rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _load_file(path: Path, split: str) -> Source:
    if path.suffix == ".parquet":
        return Source.of(split, str(path), load_dataset("parquet", data_files=str(path), split="train"))
    with open_text(path) as file:
        if path.suffix == ".csv":
            numbered = ((n, {name: cell or None for name, cell in row.items()}) for n, row in csv_rows(path, file))
            rows = [(f"line {number}", row) for number, row in numbered]
        else:
            rows = _read_json(path, file.read())
    if not rows:
        raise ValueError(f"{path} holds no rows.")
    return Source(split, str(path), list(dict.fromkeys(name for _, row in rows for name in row)), rows)


def _read_json(path: Path, text: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a file with one on each line, or (`.json` only) of one list."""
    if path.suffix != ".json" or not text.lstrip().startswith("["):
        return [(f"line {number}", row) for number, row in json_rows(path, io.StringIO(text), strict=True)]
    rows = list(_placed(parse_json(text, str(path), strict=True)))
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{path}, {place} is {type(row).__name__}, not an object with columns.")
    return rows
