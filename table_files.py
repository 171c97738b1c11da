"""Tables as streams of rows: CSV, JSON lines and Parquet, read and written in constant memory."""

import csv
import json
import logging
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from clsgen.atomic_io import jsonable

ENDINGS = (".csv", ".jsonl", ".parquet")
NumberedRow = tuple[int, dict[str, Any]]  # with the number of its line, or of its last
_ROW_GROUP = 1024
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # a surrogate without its other half
logger = logging.getLogger(__name__)


def check_ending(path: Path) -> str:
    """The path's ending, one of `ENDINGS`; raises `ValueError` for another."""
    if path.suffix not in ENDINGS:
        raise ValueError(f"{path}: the file's ending must be one of {', '.join(ENDINGS)}.")
    return path.suffix


def read_columns(path: Path) -> list[str]:
    """Names of the columns: of the header, the schema, or any JSON line."""
    if check_ending(path) == ".parquet":
        return pq.read_schema(path).names
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            return next(csv.reader(file), [])
    return list(dict.fromkeys(name for row in read_rows(path) for name in row))


def read_schema(path: Path) -> pa.Schema:
    """Columns and types of a whole table; cells of CSV are strings, and JSON lines are read through.

    Raises:
        ValueError: for a column that holds several types, naming file and column; as [`read_rows`].
    """
    if check_ending(path) == ".parquet":
        return pq.read_schema(path)
    if path.suffix == ".csv":
        return pa.schema([(name, pa.string()) for name in read_columns(path)])
    schema, rows = pa.schema([]), read_rows(path)
    while chunk := list(islice(rows, _ROW_GROUP)):
        schema = unify(str(path), schema, schema_of(str(path), chunk))
    return schema


def schema_of(what: str, rows: list[dict[str, Any]]) -> pa.Schema:
    """Names and types of the rows' values; errors name types and never values, for values are texts."""
    fields = []
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        try:
            fields.append(pa.field(name, pa.array(values).type))
        except (pa.ArrowException, OverflowError) as error:
            kinds = sorted({type(value).__name__ for value in values if value is not None})
            raise ValueError(
                f"{what}: the column {name!r} holds {' and '.join(kinds)}, which no Parquet column can."
            ) from error
    return pa.schema(fields)


def unify(what: str, *schemas: pa.Schema) -> pa.Schema:
    """One schema for all: integers give way to floats and "no value" to any type; raises `ValueError` for others."""
    try:
        return pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(f"{what}: the columns don't fit those of the rows before: {error}") from error


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table, one by one; CSV cells stay strings.

    Raises:
        ValueError: for a line that is not what the file's ending says, naming file and line.
    """
    ending = check_ending(path)
    if ending == ".parquet":
        for batch in pq.ParquetFile(path).iter_batches(_ROW_GROUP):
            yield from batch.to_pylist()
        return
    with open_text(path) as file:
        for _, row in csv_rows(path, file) if ending == ".csv" else json_rows(path, file):
            yield row


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A file of UTF-8, its line ends as they are; raises `ValueError` as soon as what is read is something else."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets begin it with a byte order mark
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}). Save it as UTF-8.") from error


def csv_rows(path: str | Path, file: Iterable[str], columns: list[str] | None = None) -> Iterator[NumberedRow]:
    """Rows of CSV lines; `columns` where the header is not among them. `path` is what errors call it.

    All cells are strings: type inference would turn an id of digits into a number, and "nan" into nothing.
    """
    csv.field_size_limit(2**31 - 1)  # the default of 131,072 characters is less than a long note
    reader = csv.reader(file, strict=True)
    try:
        columns = next(reader, []) if columns is None else columns
        if len(set(columns)) < len(columns):
            raise ValueError(f"{path}: a column name stands twice in {columns}.")
        blank = None
        for cells in reader:
            if not cells:
                blank = reader.line_num
                continue
            if len(cells) != len(columns):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(cells)} cell(s) for the {len(columns)} columns."
                )
            if blank and len(columns) == 1:
                raise ValueError(
                    f"{path}, line {blank} is blank: with one column, that may be an empty cell or no row. Write "
                    '"" for the former, or take the line out.'
                )
            yield reader.line_num, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is not CSV: {error}. Check the quotes.") from error


def json_rows(path: str | Path, file: Iterable[str], strict: bool = False) -> Iterator[NumberedRow]:
    """Rows of JSON lines. `path` is what errors call it.

    Half a character, which no file can hold, is read as U+FFFD, with a warning; a `strict` reader leaves it for the
    caller to refuse, and refuses what Python adds to JSON.
    """
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        row = parse_json(line, f"{path}, line {number}", strict)
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is {type(row).__name__}, not an object with columns.")
        if (
            not strict
            and "\\ud" in line.lower()
            and _HALF_CHARACTER.search(text := json.dumps(row, ensure_ascii=False))
        ):
            logger.warning(
                "%s, line %d holds half a character, which no file can: it is read as U+FFFD.", path, number
            )
            row = json.loads(_HALF_CHARACTER.sub("\ufffd", text))
        yield number, row


def parse_json(text: str, what: str, strict: bool) -> Any:
    """What `json.loads` makes of a text; raises `ValueError` that names `what`, where `strict` also for NaN."""
    try:
        return json.loads(text, parse_constant=_refuse_constant if strict else None)
    except ValueError as error:
        raise ValueError(f"{what} is not JSON: {error}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value; write null for a missing one.")


def write_rows(path: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema | None = None) -> None:
    """Writes a table, first under a temporary name beside it, then by renaming.

    Args:
        path (`Path`): The file; its ending says the format.
        rows (`Iterable[dict]`): All with the same keys. A number that is none becomes `null` in JSON lines.
        schema (`pyarrow.Schema`, *optional*): For Parquet, which needs one, and the header of a CSV without rows.
    """
    ending = check_ending(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        if ending == ".parquet":
            _write_parquet(temporary, iter(rows), schema)
        else:
            with temporary.open("w", encoding="utf-8", newline="") as file:
                _write_csv(file, rows, schema) if ending == ".csv" else _write_json(file, rows)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_csv(file: Any, rows: Iterable[dict[str, Any]], schema: pa.Schema | None) -> None:
    rows = iter(rows)
    first = list(islice(rows, 1))
    names = list(first[0]) if first else schema.names if schema else []
    if names:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(chain(first, rows))


def _write_json(file: Any, rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        file.write(json.dumps(jsonable(row), ensure_ascii=False, allow_nan=False, default=str) + "\n")


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]], schema: pa.Schema) -> None:
    with pq.ParquetWriter(path, schema) as writer:
        while group := list(islice(rows, _ROW_GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
