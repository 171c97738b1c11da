"""Answers on disk while a run is under way, from which it goes on after a kill."""

import contextlib
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


class Journal:
    """Answers so far, one a line, that survive a kill; a line that was being written is written again.

    One run at a time may have it open: a context manager that closes it at the end.

    Args:
        path (`Path`): The file; its folder is made if need be.
        run (`dict`): What the answers depend on; a journal of another run is refused.
        overwrite (`bool`, *optional*): Forget what the file holds.

    Raises:
        BlockingIOError: Another run has it open.
        ValueError: It holds the answers of another run.
    """

    def __init__(self, path: Path, run: dict[str, Any], overwrite: bool = False):
        self.path = path
        self.count = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(f"{path}.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise BlockingIOError(f"{path} is in use by another run: wait for it, or name another output.") from None
        try:
            self._open(run, overwrite)
        except BaseException:
            self.close()
            raise

    def _open(self, run: dict[str, Any], overwrite: bool) -> None:
        content = self.path.read_bytes() if self.path.exists() and not overwrite else b""
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.count(b"\n")
        if not lines:  # none so far, or killed while the first line was written
            self.path.write_text(json.dumps(run) + "\n", encoding="utf-8")
            return
        if json.loads(whole.partition(b"\n")[0]) != run:
            raise ValueError(
                f"{self.path} holds the answers of another run (other model, input or options). Finish that one, or "
                "start afresh with --overwrite true."
            )
        if len(whole) < len(content):
            with self.path.open("rb+") as file:
                file.truncate(len(whole))
        self.count = lines - 1

    def check_fits(self, rows: int) -> None:
        """Raises `ValueError` where there are more answers than rows."""
        if self.count > rows:
            raise ValueError(
                f"{self.path} holds {self.count} answers about {rows} rows: nobody can tell whose they are. Start "
                "afresh with --overwrite true."
            )

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

    def remove(self) -> None:
        """Deletes it, where its answers are in their place."""
        self.path.unlink()
        self.close()

    def close(self) -> None:
        """Lets another run open it."""
        if self._lock.is_locked:
            with contextlib.suppress(OSError):  # of Windows, where the lock's file goes by itself
                Path(self._lock.lock_file).unlink()
            self._lock.release()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()
