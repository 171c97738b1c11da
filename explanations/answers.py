"""Answers of a teacher, kept: each on the disk before anything else happens, and none asked for twice."""

import asyncio
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clsgen.explanations.protocols import Answer, Asker, UnusableAnswerError
from clsgen.explanations.teacher import TRUNCATED, Messages, RefusedRowError, Reply, Teacher, TeacherArguments
from clsgen.journal import Journal

_FORMAT = {"format": "clsgen teacher answers", "version": 1}


@dataclass(frozen=True)
class Outcome:
    """What came of asking about a row by one protocol: an answer, or the reason why there is none that can be used."""

    answer: Answer | None
    problem: str | None = None
    detail: str | None = None


class AnswerStore:
    """An append-only file of replies, one a line, found again by what was asked: conversation, model and parameters.

    A reply is on the disk when [`add`] returns. A line that was cut by a kill is dropped when the file is opened
    again. One process at a time may write.

    Args:
        path (`Path`): The file.

    Raises:
        BlockingIOError: Another process has it open.
        ValueError: It is another kind of file.
    """

    def __init__(self, path: Path):
        try:
            with ExitStack() as opened:
                self._journal = opened.enter_context(Journal(path, _FORMAT))
                self._replies = {line["key"]: Reply(**line["reply"]) for line in self._journal}
                opened.pop_all()
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no file of teacher answers ({error}): move it away.") from error

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, key: str) -> Reply | None:
        """The reply to what has this key, if it was asked before."""
        return self._replies.get(key)

    def add(self, key: str, reply: Reply, **about: Any) -> None:
        """Writes a reply, and what may help a person who reads the file."""
        self._journal.append([{"key": key, **about, "reply": asdict(reply)}])
        self._replies[key] = reply

    def close(self) -> None:
        """Lets another process write."""
        self._journal.close()


def request_key(arguments: TeacherArguments, messages: Messages, schema: dict[str, Any], max_tokens: int) -> str:
    """What an answer depends on, as one short name (SHA-256 of canonical JSON)."""
    asked = {
        "model": arguments.model, "temperature": arguments.temperature, "seed": arguments.request_seed,
        "max_tokens": max_tokens, "messages": messages, "schema": schema,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(asked, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:32]


class CachedTeacher:
    """A teacher that is asked only what the store does not know, and again where an answer has not the right form.

    Args:
        teacher (`Teacher`): Whom to ask.
        arguments (`TeacherArguments`): Parameters of its answers.
        asker (`Asker`): What to ask.
        store (`AnswerStore`): What was answered.
        on_reply (`Callable`, *optional*): Called once with each reply that is used, new or known.
    """

    def __init__(
        self,
        teacher: Teacher,
        arguments: TeacherArguments,
        asker: Asker,
        store: AnswerStore,
        on_reply: Callable[[Reply], None] = lambda reply: None,
    ):
        self.teacher, self.arguments, self.asker, self.store = teacher, arguments, asker, store
        self._on_reply = on_reply
        self._used: set[str] = set()
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def ask(self, row: dict[str, Any], protocol: str) -> Outcome:
        """Asks about a row, at most `1 + max_reasks` times; raises as [`Teacher.ask`] does for more than this row."""
        messages, max_tokens = self.asker.messages(row, protocol), self.arguments.max_tokens
        for attempt in range(1 + self.arguments.max_reasks):
            try:
                reply = await self._reply(row, protocol, attempt, messages, max_tokens)
                return Outcome(self.asker.read(reply, protocol))
            except RefusedRowError as error:
                return Outcome(None, error.reason, str(error))
            except UnusableAnswerError as error:
                problem = error
            if reply.finish_reason not in ("stop", TRUNCATED) or reply.refusal:
                break  # the text itself is refused, and would be again
            messages = self.asker.ask_again(self.asker.messages(row, protocol), reply, problem)
            max_tokens = max_tokens * 2 if reply.finish_reason == TRUNCATED else max_tokens
        return Outcome(None, problem.reason, str(problem))

    async def _reply(
        self, row: dict[str, Any], protocol: str, attempt: int, messages: Messages, max_tokens: int
    ) -> Reply:
        schema = self.asker.schema(protocol)
        key = request_key(self.arguments, messages, schema, max_tokens)
        async with self._locks[key]:  # rows with the same text ask once
            reply = self.store.get(key)
            if reply is None:
                reply = await self.teacher.ask(messages, schema, max_tokens)
                self.store.add(key, reply, row=row["id"], protocol=protocol, attempt=attempt)
            if key not in self._used:
                self._used.add(key)
                self._on_reply(reply)
        return reply

    def known(self, row: dict[str, Any], protocol: str) -> bool:
        """Whether the store holds the first answer about a row."""
        messages, schema = self.asker.messages(row, protocol), self.asker.schema(protocol)
        return self.store.get(request_key(self.arguments, messages, schema, self.arguments.max_tokens)) is not None
