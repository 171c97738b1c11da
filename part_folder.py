"""A folder of Parquet parts, local or in a bucket: each is there whole or not at all, and all are of one run."""

import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import dataset, fs

from clsgen.table_shards import open_location

MANIFEST, COMPLETE = "_manifest.json", "_SUCCESS"


class PartFolder:
    """The output of one run.

    Args:
        location (`str`): Path or URI.
        run (`dict`): What the answers depend on; JSON.
        parts (`int`): How many there will be.
    """

    def __init__(self, location: str, run: dict[str, Any], parts: int):
        self.location, self.run, self.parts = location, run, parts
        self.filesystem, self.path = open_location(location)
        self.key = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:12]

    def part_name(self, part: int) -> str:
        """In the order of the input, and of this run alone: a straggler of another one can't replace it."""
        return f"part-{part:06d}-of-{self.parts:06d}-{self.key}.parquet"

    def names(self) -> set[str]:
        """Of all files that are there."""
        return {info.base_name for info in self.filesystem.get_file_info(fs.FileSelector(self.path))}

    def missing(self) -> list[int]:
        """Parts that are not there yet."""
        names = self.names()
        return [part for part in range(self.parts) if self.part_name(part) not in names]

    def has(self, part: int) -> bool:
        """Whether a part is there."""
        return self.filesystem.get_file_info(f"{self.path}/{self.part_name(part)}").is_file

    def claim(self, overwrite: bool) -> None:
        """Makes the folder this run's; `overwrite` removes the parts of another run. This run's own ones stay.

        Raises:
            ValueError: where it holds another run's parts, or files of something else.
        """
        self.filesystem.create_dir(self.path, recursive=True)
        names = self.names()
        if MANIFEST in names:
            with self.filesystem.open_input_stream(f"{self.path}/{MANIFEST}") as stream:
                known = json.loads(stream.read())
            if known == self.run:
                return
            if not overwrite:
                changed = sorted(name for name in known | self.run if known.get(name) != self.run.get(name))
                raise ValueError(
                    f"{self.location} holds the answers of another run: {', '.join(changed)} changed. Name another "
                    "--output, or replace it with --overwrite true."
                )
            self._delete(name for name in names if name == COMPLETE or name.startswith(("part-", "_part-")))
        elif any(not name.startswith("_") for name in names):
            raise ValueError(f"{self.location} holds other files: name a new folder as --output.")
        self._write(MANIFEST, json.dumps(self.run, indent=2).encode())

    def write_part(self, part: int, table: pa.Table) -> None:
        """Writes a part; one that is there is replaced by its like."""
        buffer = pa.BufferOutputStream()  # a stream to a bucket that is closed by an error would publish half a file
        pq.write_table(table, buffer)
        self._write(self.part_name(part), buffer.getvalue())

    def _write(self, name: str, content: Any) -> None:
        temporary = f"{self.path}/_{name}.{uuid.uuid4().hex}"
        with self.filesystem.open_output_stream(temporary) as stream:
            stream.write(content)
        self.filesystem.move(temporary, f"{self.path}/{name}")

    def _delete(self, names: Iterable[str]) -> None:
        for name in sorted(names):  # the mark of completeness comes first
            self.filesystem.delete_file(f"{self.path}/{name}")

    def finish(self, prefix: str) -> Counter:
        """Marks the folder as complete, without what killed workers left half-written; counts labels and errors.

        Raises:
            ValueError: where a part is missing, or one of another run has come.
        """
        names, wanted = self.names(), {self.part_name(part) for part in range(self.parts)}
        if wanted != {name for name in names if name.startswith("part-")}:
            raise ValueError(f"{self.location} lacks parts or has strange ones. Run the same command again.")
        self._delete(name for name in names if name.startswith("_part-"))
        counts = Counter()
        parts = dataset.dataset([f"{self.path}/{name}" for name in sorted(wanted)], filesystem=self.filesystem)
        for batch in parts.to_batches(columns=[f"{prefix}label", f"{prefix}error"]):
            labels, errors = (column.drop_null() for column in batch.columns)
            counts.update({pair["values"]: pair["counts"] for pair in labels.value_counts().to_pylist()})
            counts["errors"] += len(errors)
        self._write(COMPLETE, b"")
        return counts
