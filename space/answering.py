"""What the page shows for a text or a file, step by step, as pieces of HTML."""

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import batch
import rendering

PREVIEW_ROWS = 20
FAILED = "Something went wrong on the server; it has been logged. Try again, or with a shorter text."
STOPPED = "Stopped.", rendering.empty("Stopped before the end.")
logger = logging.getLogger("space")
Shown = tuple[str, str, str, str]  # contents of the announcer, the answer, the explanation and the sentences


@dataclass
class Turn:
    """Which of a visitor's requests is still wanted: the newest one, until it is stopped."""

    number: int = 0
    stopped: bool = False

    def begin(self) -> None:
        self.number += 1
        self.stopped = False

    def stop(self) -> None:
        self.stopped = True

    def wanted(self) -> Callable[[], bool]:
        """Tells of the request that is the newest now whether it still is wanted."""
        number = self.number
        return lambda: number == self.number and not self.stopped


class Answerer:
    """Asks the model, and renders what it says.

    Args:
        model ([`ClsGenForCausalLMAndClassification`]): In evaluation mode.
    """

    def __init__(self, model: Any):
        self.model = model
        self.prompt = model.encoder.prompt
        self.labels = model.config.label_names
        self.error_rate = (model.config.conformal or {}).get("error_rate")

    def check_text(self, text: str | dict[str, str]) -> None:
        """Raises `ValueError` for a text that can't be answered, saying why."""
        for name, value in ({"text": text} if isinstance(text, str) else text).items():
            if not value.strip():
                raise ValueError(f"“{rendering.readable(name)}” is empty. Write or paste something there first.")
            if len(value) > batch.MAX_CHARACTERS:
                raise ValueError(
                    f"“{rendering.readable(name)}” has {len(value):,} characters; at most {batch.MAX_CHARACTERS:,} "
                    "are read here."
                )
        self.model.encoder.encode(text)

    def answer_text(self, text: str | dict[str, str], weigh: bool, wanted: Callable[[], bool]) -> Iterator[Shown]:
        """Answers one text, the number first, then the words while they are written, then the sentences.

        Args:
            text (`str` or `dict[str, str]`): As `classify` takes it.
            weigh (`bool`): Whether to say what each sentence does.
            wanted (`Callable`): Whether to go on.
        """
        try:
            self.check_text(text)
            yield "Reading the text.", rendering.progress("Reading the text…"), "", ""
            yield from self._answered(text, weigh, wanted)
        except ValueError as error:
            yield "", rendering.problem(str(error)), "", ""
        except Exception:
            logger.exception("A text could not be answered")
            yield "", rendering.problem(FAILED), "", ""

    def _answered(self, text: str | dict[str, str], weigh: bool, wanted: Callable[[], bool]) -> Iterator[Shown]:
        if not wanted():
            yield *STOPPED, "", ""
            return
        with contextlib.closing(self.model.stream(text)) as events:  # closed early, it ends the writing
            prediction = next(events)
            answer = rendering.answer(prediction, self.labels, self.error_rate)
            announced, told, words = self._spoken(prediction), 0, ""
            yield announced, answer, rendering.explanation("", prediction.explained_label, writing=True), ""
            for event in events:
                if not isinstance(event, str):
                    prediction = event
                    continue
                words += event
                if not wanted():
                    unfinished = rendering.explanation(words, prediction.explained_label)
                    yield STOPPED[0], answer, unfinished, STOPPED[1]
                    return
                # Screen readers get whole sentences, each once, not the text again with each piece.
                end = rendering.complete_sentences(words, told)
                if end > told:
                    announced, told = words[told:end].strip(), end
                yield announced, answer, rendering.explanation(words, prediction.explained_label, writing=True), ""
        yield from self._ended(text, prediction, answer, prediction.explanation[told:].strip(), weigh, wanted)

    def _ended(
        self,
        text: str | dict[str, str],
        prediction: Any,
        answer: str,
        unsaid: str,
        weigh: bool,
        wanted: Callable[[], bool],
    ) -> Iterator[Shown]:
        other = rendering.says_other_verdict(prediction.explanation, self.prompt.verdicts, prediction.label_id)
        cut = bool(getattr(prediction, "explanation_cut", None))  # the code of older checkpoints doesn't say
        explained = rendering.explanation(prediction.explanation, prediction.explained_label, other, cut=cut)
        ending = f" {rendering.CONTRADICTION}." if other else ""
        announced = f"{unsaid} The explanation {'was cut off' if cut else 'is complete'}.{ending}".strip()
        yield announced, answer, explained, rendering.progress("Leaving out each sentence in turn…") if weigh else ""
        if weigh and not wanted():
            yield STOPPED[0], answer, explained, STOPPED[1]
        elif weigh:
            fields = {"text": text} if isinstance(text, str) else text
            found = self.model.attribute(text)
            weighed = rendering.relevance(fields, found, self.labels, prediction.truncated)
            yield "The sentences are weighed.", answer, explained, weighed

    def _spoken(self, prediction: Any) -> str:
        """The answer, as a screen reader says it."""
        number = (
            f"{rendering.readable(prediction.label)}, probability of {rendering.readable(self.labels[1])} "
            f"{rendering.percent(prediction.probability)}"
        )
        notes = (title for title, _ in rendering.warnings(prediction, self.labels, self.error_rate))
        return ". ".join([number, *notes, ""])

    def answer_file(
        self, path: str | None, explain: bool, wanted: Callable[[], bool]
    ) -> Iterator[tuple[str, str, Path | None]]:
        """Answers a CSV file: contents for the announcer and the report, and at the end the written file.

        That file is there until the next step is asked for.

        Args:
            path (`str`, *optional*): The file.
            explain (`bool`): Whether to write explanations.
            wanted (`Callable`): Whether to go on.
        """
        try:
            if not path:
                raise ValueError("No file is chosen. Upload a CSV file first.")
            table = batch.read_table(path, self.prompt.fields, self.model.encoder.encode, explain)
            total = sum(row.error is None for row in table.rows)
            yield f"Answering {total} rows.", rendering.progress(f"0 of {total} rows answered", 0, total), None
            for done in batch.answer_rows(self.model, table, explain):
                if not wanted():
                    yield "Stopped.", rendering.empty("Stopped. Nothing was written."), None
                    return
                yield "", rendering.progress(f"{done} of {total} rows answered", done, total), None
            with tempfile.TemporaryDirectory() as folder:
                target = Path(folder) / f"{Path(path).stem}_answers.csv"
                batch.write_table(target, table, explain)
                report = rendering.report(table.rows, self.labels, PREVIEW_ROWS)
                yield "All rows are done. The file can be downloaded.", report, target
        except ValueError as error:
            yield "", rendering.problem(str(error)), None
        except Exception:
            logger.exception("A file could not be answered")
            yield "", rendering.problem(FAILED), None
