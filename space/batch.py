"""A CSV file of texts in, the same rows with answers out: none is lost, and each that can't be answered says why."""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_BYTES = 2_000_000
MAX_ROWS = 500
MAX_EXPLAINED_ROWS = 25
MAX_CHARACTERS = 50_000
CHUNK = 16
PREFIX = "clsgen_"
ANSWERS = ("label", "probability", "threshold", "prediction_set", "abstained", "truncated")
EXPLAINED = ("lm_probability", "explanation", "explanation_cut")
DELIMITERS = (",", ";", "\t")
_FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")


@dataclass
class Row:
    """One record of the file.

    Args:
        number (`int`): As a spreadsheet counts: the header is row 1.
        cells (`list[str]`): As many as there are columns.
        text (`str` or `dict`): What the model is asked; `None` where `error` says why not.
        error (`str`): Why there is no answer.
        prediction (`Prediction`): The answer.
    """

    number: int
    cells: list[str]
    text: str | dict[str, str] | None = None
    error: str | None = None
    prediction: Any = None


@dataclass
class Table:
    """A file that can be answered."""

    columns: list[str]
    delimiter: str
    rows: list[Row] = field(default_factory=list)


def read_table(path: str | Path, fields: Sequence[str], check: Callable[[Any], Any], explain: bool) -> Table:
    """Reads a CSV file, with commas, semicolons or tabs between its cells.

    Args:
        path (`str` or `Path`): The file.
        fields (`Sequence[str]`): The columns that make up a text; or one column `text` of whole texts.
        check (`Callable`): Raises `TypeError` or `ValueError` for a text that can't be answered.
        explain (`bool`): Whether explanations are asked for; fewer rows are allowed then.

    Raises:
        ValueError: for a file that can't be used at all, saying what to do.
    """
    content = _decode(Path(path))
    csv.field_size_limit(MAX_BYTES)
    delimiter = max(DELIMITERS, key=content.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = [name.strip() for name in next(reader, [])]
        wanted = _wanted(columns, fields)
        table = Table(columns, delimiter)
        # Blank lines count, as they do in a spreadsheet, but are no rows.
        for number, cells in enumerate(reader, start=2):
            if cells:
                table.rows.append(_row(number, cells, columns, wanted, check))
    except csv.Error as error:
        raise ValueError(f"Line {reader.line_num} is not CSV: {error}. Check the quotes.") from error
    most = MAX_EXPLAINED_ROWS if explain else MAX_ROWS
    if not table.rows:
        raise ValueError("The file has no rows under its header.")
    if len(table.rows) > most:
        kind = " with explanations" if explain else ""
        raise ValueError(f"The file has {len(table.rows)} rows; at most {most} are answered here{kind}. Split it.")
    return table


def _decode(path: Path) -> str:
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(
            f"The file has {size / 1e6:.1f} MB; at most {MAX_BYTES / 1e6:.0f} MB are read here. Split it."
        )
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError("The file is not UTF-8. Save it as “CSV UTF-8”.") from error
    if "\0" in content:
        raise ValueError("The file holds NUL bytes, so it is no text. Save it as “CSV UTF-8”.")
    return content


def _wanted(columns: list[str], fields: Sequence[str]) -> list[str]:
    """The columns that are read: those of the fields, or `text`."""
    if not any(columns):
        raise ValueError(f"The file is empty. Its first line must name the columns: {', '.join(fields)}.")
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise ValueError(f"More than one column is named {', '.join(map(repr, twice))}. Rename all but one.")
    taken = [name for name in columns if name.startswith(PREFIX)]
    if taken:
        raise ValueError(f"The file has answers already ({', '.join(taken)}). Remove these columns.")
    missing = [name for name in fields if name not in columns]
    if not missing:
        return list(fields)
    if "text" in columns:
        return ["text"]
    raise ValueError(
        f"There is no column named {' or '.join(map(repr, missing))}; the file has {', '.join(map(repr, columns))}. "
        f"The first line must name {', '.join(map(repr, fields))}, or 'text' for whole texts."
    )


def _row(number: int, cells: list[str], columns: list[str], wanted: list[str], check: Callable[[Any], Any]) -> Row:
    row = Row(number, (cells + [""] * len(columns))[: len(columns)])
    if len(cells) != len(columns):
        row.error = f"It has {len(cells)} cells, the header {len(columns)}."
        if len(cells) > len(columns):
            row.error += f" Left over: {' | '.join(cells[len(columns) :])}"
        return row
    values = dict(zip(columns, cells, strict=True))
    text = values["text"] if wanted == ["text"] else {name: values[name] for name in wanted}
    longest = max(len(values[name]) for name in wanted)
    try:
        if longest > MAX_CHARACTERS:
            raise ValueError(f"A text of {longest:,} characters; at most {MAX_CHARACTERS:,} are read here.")
        check(text)
        row.text = text
    except (TypeError, ValueError) as error:
        row.error = str(error)
    return row


def answer_rows(model: Any, table: Table, explain: bool) -> Iterator[int]:
    """Answers the rows that can be, in chunks; yields how many are done.

    A chunk that fails is asked again row by row, so that one row's failure is that row's answer alone.
    """
    ask = model.classify_and_explain if explain else model.classify
    rows = [row for row in table.rows if row.error is None]
    size = CHUNK // 4 if explain else CHUNK
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        try:
            for row, prediction in zip(chunk, ask([row.text for row in chunk]), strict=True):
                row.prediction = prediction
        except (RuntimeError, TypeError, ValueError):
            for row in chunk:
                try:
                    row.prediction = ask(row.text)
                except (RuntimeError, TypeError, ValueError) as error:
                    row.error = f"The model could not answer it ({type(error).__name__})."
        yield start + len(chunk)


def answer_cells(row: Row, explain: bool) -> dict[str, str]:
    """The new cells of a row."""
    names = (*ANSWERS, *EXPLAINED) if explain else ANSWERS
    found = {} if row.prediction is None else row.prediction.to_dict()
    cells = {name: "" if found.get(name) is None else found[name] for name in names}
    if cells["prediction_set"] != "":
        cells["prediction_set"] = " | ".join(cells["prediction_set"])
    return {**{name: str(value) for name, value in cells.items()}, "error": row.error or ""}


def write_table(path: str | Path, table: Table, explain: bool) -> None:
    """Writes all rows with their answers, in their order, as the UTF-8 that spreadsheets recognise."""
    names = [f"{PREFIX}{name}" for name in answer_cells(table.rows[0], explain)]
    with Path(path).open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter=table.delimiter)
        writer.writerow([defused(name) for name in [*table.columns, *names]])
        for row in table.rows:
            writer.writerow([defused(cell) for cell in [*row.cells, *answer_cells(row, explain).values()]])


def defused(cell: str) -> str:
    """A cell that no spreadsheet runs as a formula: an apostrophe goes before one that starts like it.

    Numbers stay as they are. OWASP, "CSV Injection".
    """
    if not cell.lstrip(" ").startswith(_FORMULA):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell
