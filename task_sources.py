"""A task's data as they stand: in files, or in a data set on the Hub; each row with its place there."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

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
    rows = _read_csv(path) if path.suffix == ".csv" else _read_json(path)
    if not rows:
        raise ValueError(f"{path} holds no rows.")
    return Source(split, str(path), list(dict.fromkeys(name for _, row in rows for name in row)), rows)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # spreadsheets put a byte order mark before the first column
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}). Save it as UTF-8.") from error


def _read_csv(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """All cells as strings: type inference would turn an id of digits into a number, and "nan" into nothing."""
    csv.field_size_limit(2**31 - 1)  # the default of 131,072 characters is less than a long note
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    rows = []
    try:
        columns = next(reader, [])
        if len(set(columns)) < len(columns):
            raise ValueError(f"{path}: a column name stands twice in {columns}.")
        for cells in filter(None, reader):
            place = f"line {reader.line_num}"
            if len(cells) != len(columns):
                raise ValueError(f"{path}, {place}: {len(cells)} cell(s) for the {len(columns)} columns {columns}.")
            rows.append((place, {name: cell or None for name, cell in zip(columns, cells, strict=True)}))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is not CSV: {error}. Check the quotes.") from error
    return rows


def _read_json(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a file with one on each line, or (`.json` only) of one list."""
    text = _read_text(path)
    if path.suffix == ".json" and text.lstrip().startswith("["):
        rows = list(_placed(_parse_json(text, str(path))))
    else:
        lines = enumerate(text.split("\n"), start=1)
        rows = [(f"line {n}", _parse_json(line, f"{path}, line {n}")) for n, line in lines if line.strip()]
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{path}, {place} is {type(row).__name__}, not an object with columns.")
    return rows


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value; write null for a missing label")
