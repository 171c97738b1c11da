"""A table of any size, in a folder or a bucket, as shards: runs of consecutive rows that workers read one by one."""

import csv
import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs
from tqdm.auto import tqdm

from clsgen.table_files import check_ending, csv_rows, json_rows, schema_of, unify

logger = logging.getLogger(__name__)
_BUFFER = 2**20  # bytes of a column that are held, in the place of a whole row group's
_MOST_SHARDS_PER_ROW_GROUP = 64


@dataclass(frozen=True)
class TableFile:
    """A file of the table, as it was when it was listed.

    Args:
        path (`str`): In its file system.
        name (`str`): Below the folder that was listed; what columns and errors call it.
        size (`int`): In bytes.
        mtime_ns (`int`, *optional*): When it was last changed, where the file system knows.
    """

    path: str
    name: str
    size: int
    mtime_ns: int | None

    @property
    def ending(self) -> str:
        """`.csv`, `.jsonl` or `.parquet`."""
        return PurePosixPath(self.path).suffix


@dataclass(frozen=True)
class Shard:
    """Consecutive rows of one file.

    Args:
        file (`TableFile`): The file.
        first (`int`): Place of the first row in the file, counted from 0.
        rows (`int`): How many.
        offset (`int`): Byte at which the first row starts, in CSV and JSONL; 0 for a file's first shard.
    """

    file: TableFile
    first: int
    rows: int
    offset: int = 0


def open_location(location: str) -> tuple[fs.FileSystem, str]:
    """The file system and the path in it of a local path or a URI (`s3://`, `gs://`, `abfss://`, `hdfs://`, `hf://`).

    Raises:
        ValueError: for what is no location; OSError: for a bucket that can't be reached.
    """
    if "://" not in location:
        return fs.LocalFileSystem(), str(Path(location).absolute())
    if urlsplit(location).password:
        raise ValueError("A location must not hold a password, for logs would: keep keys in the environment.")
    try:
        return fs.FileSystem.from_uri(location)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{location}: {error}") from error
    except OSError as error:
        raise _unreachable(location, error) from error


def _unreachable(location: str, error: OSError) -> OSError:
    hint = "Are the credentials there (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, ...), and the region?"
    return type(error)(f"{location} can't be reached: {error}. {hint if '://' in location else ''}".strip())


def list_files(location: str) -> list[TableFile]:
    """The table's files below a folder, or the one file, in the order of their paths.

    Hidden files don't count, as in other readers of such folders: a name on the way to them starts with `.` or `_`.

    Raises:
        ValueError: where there is none, or files of several kinds or of another kind than `ENDINGS`.
        OSError: for a bucket that can't be reached.
    """
    filesystem, root = open_location(location)
    try:
        found = filesystem.get_file_info(root)
        below = [found] if found.is_file else filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{location} is not there.") from error
    except OSError as error:
        raise _unreachable(location, error) from error
    files = []
    for info in sorted((info for info in below if info.is_file), key=lambda info: info.path):
        name = info.base_name if found.is_file else str(PurePosixPath(info.path).relative_to(root))
        if found.is_file or not any(part.startswith((".", "_")) for part in name.split("/")):
            files.append(TableFile(info.path, name, info.size, info.mtime_ns))
    endings = {check_ending(Path(file.path)) for file in files}
    if len(endings) != 1:
        raise ValueError(f"{location} must hold files of one kind, but has {sorted(endings) or 'none'}.")
    return files


def cut_table(
    location: str, files: list[TableFile], rows_per_shard: int, check: Callable[[TableFile, list[str]], None]
) -> tuple[pa.Schema, list[Shard]]:
    """Columns and types of all files together, and their shards: the same ones every time.

    CSV and JSONL are read once, Parquet in its footer alone. `check` may refuse the columns of a file.

    Raises:
        ValueError: for a file that is not what its ending says, a column that holds several types, and no rows.
    """
    filesystem, _ = open_location(location)
    schema, shards = pa.schema([]), []
    with tqdm(desc="Reading", total=sum(file.size for file in files), unit="B", unit_scale=True) as progress:
        for file in files:
            cut = _cut_parquet if file.ending == ".parquet" else _cut_text
            found, cuts = cut(filesystem, file, rows_per_shard, progress)
            if cuts or file.ending != ".jsonl":
                check(file, found.names)
            schema = unify(file.name, schema, found)
            shards += cuts
    if not shards:
        raise ValueError(f"{location} holds no rows.")
    return schema, shards


def _cut_parquet(
    filesystem: fs.FileSystem, file: TableFile, rows_per_shard: int, progress: tqdm
) -> tuple[pa.Schema, list[Shard]]:
    with filesystem.open_input_file(file.path) as handle:
        parquet = _open_parquet(file, handle)
        rows, schema = parquet.metadata.num_rows, parquet.schema_arrow.remove_metadata()
        largest = max((parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)), default=0)
    if largest > _MOST_SHARDS_PER_ROW_GROUP * rows_per_shard:
        logger.warning(
            "%s: a row group holds %d rows, and each part of %d reads it from its start. Write the file with smaller "
            "ones (`row_group_size` of pyarrow and pandas), or have larger parts.", file.name, largest, rows_per_shard,
        )  # fmt: skip
    progress.update(file.size)
    return schema, [Shard(file, first, min(rows_per_shard, rows - first)) for first in range(0, rows, rows_per_shard)]


def _cut_text(
    filesystem: fs.FileSystem, file: TableFile, rows_per_shard: int, progress: tqdm
) -> tuple[pa.Schema, list[Shard]]:
    schema, shards, first, offset = pa.schema([]), [], 0, 0
    if file.ending == ".csv":
        schema = pa.schema([(name, pa.string()) for name in _csv_header(filesystem, file)])
    with filesystem.open_input_file(file.path) as handle:
        stream = io.BufferedReader(handle)
        rows = _text_rows(file, stream)
        while chunk := list(islice(rows, rows_per_shard)):
            shards.append(Shard(file, first, len(chunk), offset))
            schema = unify(
                f"{file.name}, rows {first + 1} to {first + len(chunk)}", schema, schema_of(file.name, chunk)
            )
            progress.update(stream.tell() - offset)
            first, offset = first + len(chunk), stream.tell()
    return schema, shards


def read_shard(filesystem: fs.FileSystem, shard: Shard, schema: pa.Schema) -> pa.Table:
    """The shard's rows, with all columns of `schema`.

    Raises:
        ValueError: where the file was changed since it was listed.
    """
    file = shard.file
    info = filesystem.get_file_info(file.path)
    if (info.size, info.mtime_ns) != (file.size, file.mtime_ns):
        raise ValueError(f"{file.name} was changed while it was read. Run the command again.")
    with filesystem.open_input_file(file.path) as handle:
        if file.ending == ".parquet":
            table = _parquet_slice(_open_parquet(file, handle), shard.first, shard.rows)
            return pa.concat_tables([schema.empty_table(), table], promote_options="permissive")
        stream = io.BufferedReader(handle)
        columns = _csv_header(filesystem, file) if file.ending == ".csv" and shard.offset else None
        stream.seek(shard.offset)
        rows = list(islice(_text_rows(file, stream, columns, at_start=not shard.offset), shard.rows))
    return pa.Table.from_pylist(rows, schema=schema)


def _csv_header(filesystem: fs.FileSystem, file: TableFile) -> list[str]:
    with filesystem.open_input_file(file.path) as handle:
        lines = _decoded(file, io.BufferedReader(handle), at_start=True)
        try:
            return next(csv.reader(lines, strict=True), [])
        except csv.Error as error:
            raise ValueError(f"{file.name}, line 1 is not CSV: {error}.") from error


def _open_parquet(file: TableFile, handle: pa.NativeFile) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(handle, pre_buffer=False, buffer_size=_BUFFER)
    except pa.ArrowException as error:
        raise ValueError(f"{file.name} is not Parquet: {error}") from error


def _parquet_slice(parquet: pq.ParquetFile, first: int, rows: int) -> pa.Table:
    """Rows `first` to `first + rows`: of the row groups that hold them, no more than these rows are kept."""
    groups, start, position = [], 0, 0
    for group in range(parquet.num_row_groups):
        end = position + parquet.metadata.row_group(group).num_rows
        if end > first and position < first + rows:
            start = start if groups else position
            groups.append(group)
        position = end
    batches = []
    for batch in parquet.iter_batches(min(rows, 1024), row_groups=groups):
        kept = batch[max(first - start, 0) : max(first + rows - start, 0)]
        start += len(batch)
        if len(kept):
            batches.append(kept)
        if start >= first + rows:
            break
    return pa.Table.from_batches(batches, parquet.schema_arrow).replace_schema_metadata(None)


def _decoded(file: TableFile, stream: io.BufferedReader, at_start: bool) -> Iterator[str]:
    for number, line in enumerate(stream):
        try:
            yield line.decode("utf-8-sig" if at_start and not number else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file.name} is not UTF-8 ({error.reason}). Save it as UTF-8.") from error


def _text_rows(
    file: TableFile, stream: io.BufferedReader, columns: list[str] | None = None, at_start: bool = True
) -> Iterator[dict[str, Any]]:
    """Rows of CSV or JSON lines; after each, `stream.tell()` is where the next one starts."""
    lines = _decoded(file, stream, at_start)
    rows = csv_rows(file.name, lines, columns) if file.ending == ".csv" else json_rows(file.name, lines)
    return (row for _, row in rows)
