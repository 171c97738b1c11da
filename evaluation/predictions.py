"""Predictions of a checkpoint on the rows of a task, kept as they are made, so that an ended run goes on."""

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from tqdm.auto import tqdm

from clsgen.journal import Journal
from clsgen.run_record import describe_checkpoint
from clsgen.table_files import read_rows
from clsgen.tasks import Task

logger = logging.getLogger("clsgen.evaluate_clsgen")
SCHEMA = pa.schema(
    {
        "id": pa.string(), "mode": pa.string(), "gold": pa.int64(), "probability": pa.float64(), "logit": pa.float64(),
        "predicted": pa.int64(), "lm_probability": pa.float64(), "truncated": pa.bool_(), "explanation": pa.string(),
        "judged_probability": pa.float64(), "judged_label": pa.int64(),
    }
)  # fmt: skip
ANSWER = ("probability", "logit", "lm_probability", "truncated", "explanation", "explained_label")
CHUNKS = {"none": 256, "free": 32, "guided": 32}  # rows between two writes to the disk


@dataclass(frozen=True)
class LabelledTexts:
    """Rows of a split with a label, as a model is asked about them.

    Args:
        name (`str`): Of the task and split, as in `trial_claims/test`.
        ids (`list[str]`), texts (`list[str | dict[str, str]]`), gold (`list[int]`): One a row.
        explanations (`list[str | None]`): The teacher's.
        unlabelled (`int`): Rows left out because they have no label.
    """

    name: str
    ids: list[str]
    texts: list[Any]
    gold: list[int]
    explanations: list[str | None]
    unlabelled: int

    def plain(self) -> list[str]:
        """Each text as one string."""
        return [text if isinstance(text, str) else "\n\n".join(text.values()) for text in self.texts]


def labelled_texts(
    task: Task, split: str, fields: list[str], limit: int | None = None, seed: int = 0
) -> LabelledTexts:
    """The labelled rows of a split, for a model that reads `fields`.

    Where the task has other fields than the model, a text is the task's own template, filled in.

    Args:
        task ([`tasks.Task`]): The task.
        split (`str`): One of its splits.
        fields (`list[str]`): The model's.
        limit (`int`, *optional*): Most rows; drawn at random (by `seed`), since files are often sorted by label.
        seed (`int`): Of the draw.

    Raises:
        ValueError: no such split, or no labelled row in it.
    """
    if split not in task.splits:
        raise ValueError(f"The task {task.name!r} has no {split} split, only {list(task.splits)}.")
    rows = [row for row in task.splits[split] if row["label"] is not None]
    if not rows:
        raise ValueError(f"No row of {task.name}/{split} has a label: there is nothing to evaluate.")
    unlabelled = len(task.splits[split]) - len(rows)
    if limit is not None and limit < len(rows):
        rows = [rows[i] for i in sorted(np.random.default_rng(seed).permutation(len(rows))[:limit])]
    if set(fields) == set(task.fields):
        texts = [{field: row[field] for field in fields} for row in rows]
    else:
        logger.warning(
            "The model reads %s, and %s has %s: its own template, filled in, is given as one text.",
            fields, task.name, task.fields,
        )  # fmt: skip
        texts = [task.text_of(row) for row in rows]
    return LabelledTexts(
        name=f"{task.name}/{split}",
        ids=[row["id"] for row in rows],
        texts=texts,
        gold=[int(row["label"]) for row in rows],
        explanations=[row["explanation"] for row in rows],
        unlabelled=unlabelled,
    )


def predict(
    model: Any,
    rows: LabelledTexts,
    mode: str,
    folder: Path,
    overwrite: bool = False,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    known: dict[int, dict[str, Any]] | None = None,
) -> pd.DataFrame:
    """The model's answers for labelled texts, one row each, in their order.

    Answers are kept in `folder`, and those of an earlier run of the same model, rows and options are used again.

    Args:
        model ([`ClsGenForCausalLMAndClassification`]): The model.
        rows ([`LabelledTexts`]): What to ask.
        mode (`"guided"`, `"free"` or `"none"`): The explanations' mode; `"none"` gives numbers alone.
        folder (`Path`): Where answers are kept.
        overwrite (`bool`, *optional*): Whether to forget those of an earlier run.
        batch_size, max_new_tokens (`int`, *optional*): See `classify_and_explain`.
        known (`dict[int, dict]`, *optional*): Answers (`ANSWER`) that need not be asked for, by their rows' places.

    Returns:
        `pandas.DataFrame` with the columns of `SCHEMA`, but for the judged ones.

    Raises:
        ValueError: for a text that the model can't answer, by its id; for answers of another run in `folder`.
        BlockingIOError: where another run is writing them.
    """
    name = re.sub(r"[^\w.-]", "_", rows.name)
    path = folder / f"{name}-{mode}.jsonl"
    with Journal(path, asked_of(model, rows, mode, max_new_tokens), overwrite) as journal:
        journal.check_fits(len(rows.ids))
        _answer(model, rows, mode, journal, batch_size, max_new_tokens, known or {})
        answers = pd.DataFrame(list(journal), columns=list(ANSWER))
    answers.insert(0, "id", rows.ids)
    answers.insert(1, "mode", mode)
    answers.insert(2, "gold", rows.gold)
    answers.insert(5, "predicted", (answers["probability"] >= model.config.threshold).astype(int))
    return answers


def _answer(
    model: Any,
    rows: LabelledTexts,
    mode: str,
    journal: Journal,
    batch_size: int | None,
    max_new_tokens: int | None,
    known: dict[int, dict[str, Any]],
) -> None:
    """Asks about the rows that the journal lacks and nobody knows."""
    for row_id, text in zip(rows.ids[journal.count :], rows.texts[journal.count :], strict=True):
        try:
            model.encoder.encode(text)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{rows.name}, row {row_id!r}: {error}") from error
    if journal.count:
        logger.info("%s, %s: %d of %d answers are there already.", rows.name, mode, journal.count, len(rows.ids))
    if known:
        logger.info("%s, %s: %d of %d answers are known already.", rows.name, mode, len(known), len(rows.ids))
    lengths = {} if max_new_tokens is None or mode == "none" else {"max_new_tokens": max_new_tokens}
    with tqdm(desc=f"{rows.name} ({mode})", unit="row", initial=journal.count, total=len(rows.ids)) as progress:
        while journal.count < len(rows.ids):
            places = range(journal.count, len(rows.ids))
            asked = [place for place in places if place not in known][: CHUNKS[mode]]
            if len(asked) == CHUNKS[mode]:
                places = range(journal.count, asked[-1] + 1)
            window = [rows.texts[place] for place in asked]
            try:
                if mode == "none":
                    predictions = model.classify(window, batch_size=batch_size)
                else:
                    predictions = model.classify_and_explain(window, batch_size=batch_size, mode=mode, **lengths)
            except ValueError as error:
                broken = [rows.ids[asked[place]] for place in getattr(error, "texts", ())]
                if not broken:
                    raise
                raise ValueError(f"{rows.name}, row(s) {broken}: {error}") from error
            found = {
                place: {name: getattr(answer, name) for name in ANSWER}
                for place, answer in zip(asked, predictions, strict=True)
            }
            journal.append([found.get(place) or known[place] for place in places])
            progress.update(len(places))


def known_when_guided(free: pd.DataFrame, labels: tuple[str, str]) -> dict[int, dict[str, Any]]:
    """Free answers that are the guided ones too, by their rows' places, as [`predict`] takes them.

    Where free words are given the verdict line that they begin with, and it is the decision's, they go on from there
    as guided ones do.

    Args:
        free (`pandas.DataFrame`): What [`predict`] gives for `"free"`.
        labels (`tuple[str, str]`): The model's.
    """
    alike = free["explained_label"] == free["predicted"].map(dict(enumerate(labels)))
    return {int(place): answer for place, answer in free.loc[alike, list(ANSWER)].to_dict("index").items()}


def asked_of(model: Any, rows: LabelledTexts, mode: str, max_new_tokens: int | None) -> dict[str, Any]:
    """What answers depend on: the checkpoint, the rows, how they are asked."""
    digest = hashlib.sha256(json.dumps([rows.ids, rows.texts, rows.gold]).encode()).hexdigest()
    found = {**describe_checkpoint(model.config), "rows": digest, "mode": mode, "max_new_tokens": max_new_tokens}
    if mode != "none":
        found["guidance_scale"] = getattr(model.config, "explanation_guidance_scale", 1.0)
    return found


def table_rows(frames: list[pd.DataFrame]) -> Iterator[dict[str, Any]]:
    """The rows of `predictions.parquet`; what is missing is None."""
    for frame in frames:
        for row in frame.to_dict("records"):
            yield {name: None if pd.isna(row.get(name)) else row[name] for name in SCHEMA.names}


def read_predictions(path: Path) -> pd.DataFrame:
    """Another system's predictions, one row a text.

    Args:
        path (`Path`): CSV, JSONL, Parquet, or a JSON list (as `train_sft_cls.py` writes its `test_predictions.json`).
            With the columns `id` and `probability`, and where there are any `gold` (or `label`) and `predicted`. Of
            rows that differ in `mode` alone (as ours do), the first mode is taken.

    Returns:
        `pandas.DataFrame`, indexed by `id` (`str`).

    Raises:
        ValueError: a missing column, an id that stands twice, a value that is none or out of range.
    """
    rows = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else read_rows(path)
    frame = pd.DataFrame(rows)
    if "gold" not in frame:
        frame = frame.rename(columns={"label": "gold"})
    missing = [name for name in ("id", "probability") if name not in frame]
    if missing:
        raise ValueError(f"{path}: missing column(s) {missing}; found {list(frame.columns)}.")
    if "mode" in frame:
        modes = frame["mode"].fillna("")
        frame = frame[modes == modes.iloc[0]]
    frame = frame.assign(id=frame["id"].astype(str)).set_index("id")
    twice = frame.index[frame.index.duplicated()].unique().tolist()
    if twice:
        raise ValueError(f"{path}: {len(twice)} id(s) stand there more than once, e.g. {twice[:5]}.")
    for name in ("probability", "gold", "predicted"):
        if name not in frame:
            continue
        values = pd.to_numeric(frame[name], errors="coerce")
        wrong = ~(values.between(0, 1) if name == "probability" else values.isin((0, 1)))
        if name == "gold":
            wrong &= frame[name].notna() & (frame[name] != "")
        if wrong.any():
            row_id, value = next(frame.loc[wrong, name].items())
            kind = "a probability, in [0, 1]," if name == "probability" else "0 or 1"
            raise ValueError(
                f"{path}: `{name}` is not {kind} in {int(wrong.sum())} row(s), e.g. {value!r} ({row_id!r})."
            )
        frame[name] = values
    return frame
