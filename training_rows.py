"""From a task's rows to the trainer's: token ids, and labels that sit on the tokens they belong to."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from numpy.typing import ArrayLike
from transformers.data.data_collator import DataCollatorMixin
from trl import pack_dataset

from clsgen.batching_clsgen import alike
from clsgen.losses_clsgen import IGNORE_INDEX
from clsgen.prompting_clsgen import PromptEncoder

logger = logging.getLogger(__name__)
# The epoch that a row is for, null for all. No name that a task's own column would have: rows would go missing.
EPOCH = "clsgen_epoch"
# Columns beside `input_ids` that have a value a token: what pads them, and their type.
TOKEN_COLUMNS = {
    "labels": (IGNORE_INDEX, torch.long),
    "cls_labels": (float(IGNORE_INDEX), torch.float32),
    "verdicts": (False, torch.bool),
}


def encode_rows(
    dataset: Dataset,
    encoder: PromptEncoder,
    max_explanation_length: int,
    guided: bool,
    name: str = "train",
    num_proc: int | None = None,
    teach_verdicts: bool = False,
) -> Dataset:
    """Encodes rows of a task; every row with a label or an explanation comes out as one row.

    A row without an explanation ends at its decision token and trains the head alone; one without a label has no
    decision and trains the LM alone (without a verdict line, for there is no verdict to give). Of a soft label, the
    verdict line says the class, see [`hard_labels`].

    With `teach_verdicts`, what the LM's verdict is to be is the head's to say: the token that tells it has no label, a
    row without an explanation goes on to that token, and a row may have neither label nor explanation.

    Args:
        dataset (`Dataset`): With the task's fields, `label` (0 to 1, or null) and `explanation` (string or null), as
            [`tasks.load_task`] gives it.
        encoder (`PromptEncoder`): The model's.
        max_explanation_length (`int`): Most tokens of verdict line, explanation and end of turn; a longer one is cut.
        guided (`bool`): Whether the verdict line comes first.
        name (`str`, *optional*): For the log.
        num_proc (`int`, *optional*): Processes.
        teach_verdicts (`bool`, *optional*, defaults to `False`): For [`losses_clsgen.verdict_loss`].

    Returns:
        `Dataset` with `input_ids`, `labels` (-100 on the prompt), `cls_labels` (-100 but at the decision token),
        `length`; with `teach_verdicts` also `verdicts` (true at decision tokens that the verdict loss starts from);
        and `EPOCH`, where `dataset` has it.

    Raises:
        ValueError: for columns that are missing; for a row with a text that cannot be encoded, a label that is none,
            or nothing to train on.
    """
    lines = [encoder.encode_verdict(label) for label in (0, 1)]
    shared = alike(lines)
    if teach_verdicts and max_explanation_length <= shared:
        raise ValueError(
            f"`max_explanation_length` ({max_explanation_length}) leaves no room for a verdict, which takes "
            f"{shared + 1} tokens: raise it."
        )

    missing = {*encoder.prompt.fields, "label"} - set(dataset.column_names)
    if missing:
        raise ValueError(f"Rows of {name} need the column(s) {sorted(missing)}; found {dataset.column_names}.")

    def encode(row: dict[str, Any], index: int) -> dict[str, Any]:
        label, explanation = row["label"], row.get("explanation")
        place = f"Row {row.get('id', index)!r} of {name}"
        if label is not None and not (isinstance(label, int | float) and 0 <= label <= 1):
            raise ValueError(
                f"{place}: `label` must be a number from 0 to 1, or null where there is none; got {label!r}."
            )
        if label is None and not explanation and not teach_verdicts:
            raise ValueError(f"{place} has neither a label nor an explanation: there is nothing to train on.")
        try:
            prompt = encoder.encode({field: row[field] for field in encoder.prompt.fields})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{place}: {error}") from error
        completion, cut, verdict = lines[0][:shared] if teach_verdicts else [], False, None
        if explanation:
            verdict = int(hard_labels(label)) if guided and label is not None else None
            completion, cut = encoder.encode_completion(explanation, verdict, max_explanation_length)
        start = len(prompt.input_ids)
        labels = [IGNORE_INDEX] * start + (completion if explanation else [IGNORE_INDEX] * len(completion))
        teaches = teach_verdicts and (verdict is not None or not explanation)
        if teaches and explanation:
            labels[start + shared] = IGNORE_INDEX
        cls_labels = [float(IGNORE_INDEX)] * (start + len(completion))
        if label is not None:
            cls_labels[start - 1] = float(label)
        return {
            "input_ids": prompt.input_ids + completion,
            "labels": labels,
            "cls_labels": cls_labels,
            **({"verdicts": [teaches and i == start - 1 for i in range(len(labels))]} if teach_verdicts else {}),
            "length": start + len(completion),
            "text_cut": prompt.truncated,
            "explanation_cut": cut,
        }

    encoded = dataset.map(
        encode,
        with_indices=True,
        remove_columns=[name for name in dataset.column_names if name != EPOCH],
        num_proc=num_proc,
        desc=f"Tokenizing {name}",
        load_from_cache_file=False,
    )
    logger.info(
        "%s: %d rows in, %d out; %d texts cut in their middle, %d explanations cut at their end, %d tokens",
        name, len(dataset), len(encoded), sum(encoded["text_cut"]), sum(encoded["explanation_cut"]),
        sum(encoded["length"]),
    )  # fmt: skip
    return encoded.remove_columns(["text_cut", "explanation_cut"])


def hard_labels(labels: ArrayLike) -> np.ndarray:
    """Classes of labels that may be soft (between 0 and 1), int64 of the same shape: label 1 from 0.5 on."""
    return (np.asarray(labels) >= 0.5).astype(np.int64)


def label_counts(rows: Dataset) -> dict[str, int]:
    """How many decisions of each class, and how many labelled tokens, encoded rows hold."""
    counts = {"positive": 0, "negative": 0, "decisions": 0, "tokens": 0}
    for row in rows.select_columns(["labels", "cls_labels"]):
        decisions = [label for label in row["cls_labels"] if label != IGNORE_INDEX]
        counts["decisions"] += len(decisions)
        positive = int(hard_labels(decisions).sum())
        counts["positive"] += positive
        counts["negative"] += len(decisions) - positive
        counts["tokens"] += sum(label != IGNORE_INDEX for label in row["labels"])
    return counts


def token_columns(names: Iterable[str]) -> list[str]:
    """Those of `TOKEN_COLUMNS` that are among `names`; rows have no `verdicts` unless these are taught."""
    return [name for name in TOKEN_COLUMNS if name in names]


def pack_rows(rows: Dataset, max_length: int, seed: int | None = None) -> Dataset:
    """Packs encoded rows into sequences of at most `max_length` tokens, whole rows only (best fit decreasing).

    Rows share a sequence only with those of their `EPOCH`, where they have one.

    Raises:
        ValueError: where a row is longer than `max_length`, or a label would be lost.
    """
    longest = max(map(len, rows["input_ids"]))
    if longest > max_length:
        raise ValueError(
            f"A row of {longest} tokens does not fit into packed sequences of {max_length}: raise `max_length`."
        )
    before = label_counts(rows)
    columns = ["input_ids", *token_columns(rows.column_names)]
    if EPOCH in rows.column_names:
        epochs = rows[EPOCH][:]
        packed = []
        for epoch in dict.fromkeys(epochs):
            part = rows.select([i for i, other in enumerate(epochs) if other == epoch])
            part = pack_dataset(part.select_columns(columns), max_length, "bfd")
            packed.append(part.add_column(EPOCH, [epoch] * len(part), feature=rows.features[EPOCH]))
        packed = concatenate_datasets(packed)
    else:
        packed = pack_dataset(rows.select_columns(columns), max_length, "bfd")
    after = label_counts(packed)
    if after != before:
        raise ValueError(f"Packing would lose labels: {before} before, {after} after.")
    logger.info("Packed %d rows into %d sequences of at most %d tokens", len(rows), len(packed), max_length)
    return packed.shuffle(seed=seed) if seed is not None else packed


@dataclass
class DataCollatorForClsGen(DataCollatorMixin):
    """Batches encoded rows.

    Padding is on the right by default: behind a row it needs no mask (see [`head_clsgen.pads_behind`]).

    Args:
        pad_token_id (`int`): Fills padding; masked, so any id does.
        padding_side (`str`, *optional*, defaults to `"right"`): Or `"left"`.
        padding_free (`bool`, *optional*, defaults to `False`): One sequence instead of a padded batch, with
            `position_ids` that restart at each row and no attention mask.
        pad_to_multiple_of (`int`, *optional*): Pads lengths to a multiple of it.

    Example:

    ```python
    >>> collator = DataCollatorForClsGen(pad_token_id=0)
    >>> rows = [
    ...     {"input_ids": [1, 2, 3], "labels": [-100, -100, 3], "cls_labels": [-100.0, 1.0, -100.0]},
    ...     {"input_ids": [4, 5], "labels": [-100, -100], "cls_labels": [-100.0, 0.0]},
    ... ]
    >>> collator(rows)
    {'input_ids': tensor([[1, 2, 3], [4, 5, 0]]),
     'attention_mask': tensor([[1, 1, 1], [1, 1, 0]]),
     'labels': tensor([[-100, -100, 3], [-100, -100, -100]]),
     'cls_labels': tensor([[-100., 1., -100.], [-100., 0., -100.]])}
    >>> replace(collator, padding_free=True)(rows)
    {'input_ids': tensor([[1, 2, 3, 4, 5]]),
     'position_ids': tensor([[0, 1, 2, 0, 1]]),
     'labels': tensor([[-100, -100, 3, -100, -100]]),
     'cls_labels': tensor([[-100., 1., -100., -100., 0.]])}
    ```
    """

    pad_token_id: int
    padding_side: str = "right"
    padding_free: bool = False
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        names = token_columns(examples[0])
        if self.padding_free:
            lengths = [n for row in examples for n in row.get("seq_lengths") or [len(row["input_ids"])]]
            joined = {name: [value for row in examples for value in row[name]] for name in ["input_ids", *names]}
            positions = [position for n in lengths for position in range(n)]
            # A row's first token is not a target of the row before.
            labels = zip(positions, joined["labels"], strict=True)
            joined["labels"] = [IGNORE_INDEX if position == 0 else label for position, label in labels]
            columns = {name: [values] for name, values in joined.items()}
            others = {"position_ids": torch.tensor([positions])}
        else:
            length = max(len(row["input_ids"]) for row in examples)
            if self.pad_to_multiple_of:
                length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of

            def pad(values: list, fill: float) -> list:
                padding = [fill] * (length - len(values))
                return padding + list(values) if self.padding_side == "left" else list(values) + padding

            columns = {"input_ids": [pad(row["input_ids"], self.pad_token_id) for row in examples]}
            columns |= {name: [pad(row[name], TOKEN_COLUMNS[name][0]) for row in examples] for name in names}
            others = {"attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in examples])}
        tensors = {name: torch.tensor(columns[name], dtype=TOKEN_COLUMNS[name][1]) for name in names}
        return {"input_ids": torch.tensor(columns["input_ids"]), **others, **tensors}

    def padded(self) -> "DataCollatorForClsGen":
        """The same without `padding_free`: one row of the batch per row of the data, as evaluation needs it."""
        return replace(self, padding_free=False)
