"""Answers on disk while a run is under way, from which it goes on after a kill."""

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any


class Journal:
    """Answers so far, one a line, that survive a kill; a line that was being written is written again.

    Args:
        path (`Path`): The file.
        run (`dict`): What the answers depend on; a journal of another run is refused.
    """

    def __init__(self, path: Path, run: dict[str, Any]):
        self.path = path
        self.count = 0
        if not path.exists():
            path.write_text(json.dumps(run) + "\n", encoding="utf-8")
            return
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.count(b"\n")
        if not lines:  # killed while the first line was written
            path.write_text(json.dumps(run) + "\n", encoding="utf-8")
            return
        if json.loads(whole.partition(b"\n")[0]) != run:
            raise ValueError(
                f"{path} holds the answers of another run (other model, input or options). Finish that one, or start "
                "afresh with --overwrite true."
            )
        if len(whole) < len(content):
            with path.open("rb+") as file:
                file.truncate(len(whole))
        self.count = lines - 1

    def append(self, answers: list[dict[str, Any]]) -> None:
        """Adds answers; when this returns, they are on the disk."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
            file.flush()
            os.fsync(file.fileno())
        self.count += len(answers)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self.path.open(encoding="utf-8") as file:
            for line in islice(file, 1, None):
                yield json.loads(line)
