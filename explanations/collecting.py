"""Asks a teacher about rows: many at a time, in any order, with each answer on the disk before the next thing."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from clsgen.explanations.answers import AnswerStore, CachedTeacher, Outcome
from clsgen.explanations.protocols import BLIND, LABEL_CONDITIONED, Asker
from clsgen.explanations.teacher import NoReplyError, Reply, TeacherArguments, TeacherError, open_teacher
from clsgen.explanations.verdicts import verdict_disagreement

logger = logging.getLogger(__name__)
BLIND_THEN_LABEL = "blind_then_label"
PROTOCOLS = (BLIND_THEN_LABEL, BLIND, LABEL_CONDITIONED)
_FIRST_VERDICTS = 32
_CHARACTERS_PER_TOKEN = 4  # a rule of thumb for English
_TOKENS_PER_ANSWER = 150


@dataclass(frozen=True)
class Collected:
    """What came of one row; `unanswered` tells why nothing did, this time."""

    blind: Outcome | None = None
    conditioned: Outcome | None = None
    unanswered: str | None = None


class _VerdictWatch:
    """Stops a teacher that says the same whatever it reads, before it has cost much."""

    def __init__(self, allowed: bool):
        self._allowed = allowed
        self._pairs: Counter[tuple[int, int]] = Counter()

    def see(self, label: int, outcome: Outcome | None) -> None:
        """Counts a blind verdict; raises [`TeacherError`] where all are the same on both labels."""
        if outcome is None or outcome.answer is None or outcome.answer.verdict is None:
            return
        self._pairs[label, outcome.answer.verdict] += 1
        verdicts = {verdict for _, verdict in self._pairs}
        rows = [sum(n for (gold, _), n in self._pairs.items() if gold == each) for each in (0, 1)]
        if sum(rows) == _FIRST_VERDICTS and len(verdicts) == 1 and min(rows) >= _FIRST_VERDICTS // 4:
            said = f"the teacher's verdict is {verdicts.pop()} on all of the first {sum(rows)} rows, of both labels"
            if not self._allowed:
                raise TeacherError(
                    f"{said}: it does not read the texts. Use another teacher, or go on all the same with "
                    "`--allow_constant_teacher true`."
                )
            logger.warning("Careful: %s.", said)


class _Meter:
    """The progress bar, with tokens and cost."""

    def __init__(self, rows: int, arguments: TeacherArguments):
        self._arguments = arguments
        self.tokens: Counter[str] = Counter(prompt=0, completion=0, replies=0)
        self._bar = tqdm(total=rows, desc="Asking", unit="row")

    def count(self, reply: Reply) -> None:
        self.tokens.update(prompt=reply.prompt_tokens, completion=reply.completion_tokens, replies=1)
        shown = {"tokens": f"{self.tokens['prompt']}+{self.tokens['completion']}"}
        if self.cost:
            shown["cost"] = f"${self.cost:.2f}"
            if self._bar.n:
                shown["of about"] = f"${self.cost / self._bar.n * self._bar.total:.2f}"
        self._bar.set_postfix(shown, refresh=False)

    def step(self) -> None:
        self._bar.update(1)

    def close(self) -> None:
        self._bar.close()

    @property
    def cost(self) -> float:
        """US dollars of the replies."""
        return self._arguments.cost(self.tokens["prompt"], self.tokens["completion"])


async def ask_row(teacher: CachedTeacher, row: dict[str, Any], protocol: str) -> Collected:
    """Asks about a row by a protocol; by `blind_then_label`, with the label where the blind verdict disagrees."""
    if protocol == LABEL_CONDITIONED:
        return Collected(conditioned=await teacher.ask(row, LABEL_CONDITIONED))
    blind = await teacher.ask(row, BLIND)
    disagrees = blind.answer is not None and verdict_disagreement(int(row["label"]), blind.answer.verdict)
    if protocol == BLIND_THEN_LABEL and disagrees:
        return Collected(blind, conditioned=await teacher.ask(row, LABEL_CONDITIONED))
    return Collected(blind)


async def collect(
    rows: list[dict[str, Any]],
    asker: Asker,
    store: AnswerStore,
    arguments: TeacherArguments,
    protocol: str = BLIND_THEN_LABEL,
    loopback_only: bool = False,
    allow_constant_teacher: bool = False,
) -> tuple[dict[str, Collected], dict[str, float]]:
    """Asks about all rows, going on where the store's answers end.

    Args:
        rows (`list[dict]`): With `id`, `label` and the task's fields.
        asker (`Asker`): What to ask.
        store (`AnswerStore`): Where answers are kept.
        arguments (`TeacherArguments`): Whom to ask.
        protocol (`str`): One of `PROTOCOLS`.
        loopback_only (`bool`): Refuse an endpoint that is not on this machine.
        allow_constant_teacher (`bool`): Go on with a teacher whose first verdicts are all the same.

    Returns:
        What came of each row, by its id, and the tokens and the cost of all replies, of earlier runs too.

    Raises:
        TeacherError: The teacher cannot be asked. What it has answered is kept.
    """
    collected: dict[str, Collected] = {}
    watch, meter = _VerdictWatch(allow_constant_teacher), _Meter(len(rows), arguments)
    queue = iter(rows)
    async with open_teacher(arguments, loopback_only) as teacher:
        cached = CachedTeacher(teacher, arguments, asker, store, meter.count)

        async def work() -> None:
            for row in queue:
                try:
                    found = await ask_row(cached, row, protocol)
                    watch.see(int(row["label"]), found.blind)
                except NoReplyError as error:
                    found = Collected(unanswered=str(error))
                collected[row["id"]] = found
                meter.step()

        try:
            await _all_or_none([work for _ in range(min(arguments.concurrency, len(rows)))])
        finally:
            meter.close()
    return collected, {**meter.tokens, "cost_usd": round(meter.cost, 4)}


async def _all_or_none(workers: Iterable[Callable[[], Any]]) -> None:
    """Runs workers; the first error ends them all."""
    tasks = [asyncio.create_task(worker()) for worker in workers]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def estimate(
    rows: list[dict[str, Any]], asker: Asker, store: AnswerStore, arguments: TeacherArguments, protocol: str
) -> dict[str, float]:
    """What asking would take: requests, tokens and US dollars, from the fewest to the most rows asked with the label.

    Tokens are characters / 4 for prompts and 150 for an answer; reasoning and re-asks come on top.
    """
    cached = CachedTeacher(None, arguments, asker, store)  # nobody is asked
    sizes = {BLIND: 0, LABEL_CONDITIONED: 0}
    requests = dict.fromkeys(sizes, 0)
    for each in (LABEL_CONDITIONED,) if protocol == LABEL_CONDITIONED else (BLIND, LABEL_CONDITIONED):
        for row in rows if each == BLIND or protocol != BLIND else ():
            if not cached.known(row, each):
                requests[each] += 1
                sizes[each] += sum(len(message["content"]) for message in asker.messages(row, each))
    certain = LABEL_CONDITIONED if protocol == LABEL_CONDITIONED else BLIND
    found: dict[str, float] = {"rows": len(rows)}
    for name, counted in (("least", [certain]), ("most", list(sizes))):
        prompt = sum(sizes[each] for each in counted) // _CHARACTERS_PER_TOKEN
        completion = sum(requests[each] for each in counted) * _TOKENS_PER_ANSWER
        found |= {
            f"{name}_requests": sum(requests[each] for each in counted), f"{name}_prompt_tokens": prompt,
            f"{name}_completion_tokens": completion, f"{name}_cost_usd": round(arguments.cost(prompt, completion), 4),
        }  # fmt: skip
    return found
