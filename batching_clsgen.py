"""Batches of alike lengths under a budget of tokens, from any iterable, with constant memory."""

from collections.abc import Iterable, Iterator
from itertools import islice, takewhile
from typing import Any, TypeVar

import torch
from transformers import BatchEncoding

Item = TypeVar("Item")


def pass_tokens(device: torch.device) -> int:
    """How many tokens a forward pass takes best: on a CPU, more leave its caches; on a GPU, fewer leave it idle."""
    return 2048 if device.type == "cpu" else 8192


def windows(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """`items` in lists of `size`; the last may be shorter."""
    iterator = iter(items)
    while window := list(islice(iterator, size)):
        yield window


def alike(rows: list[list[int]]) -> int:
    """How many ids all rows begin with alike."""
    first, last = min(rows), max(rows)  # in the order of their ids: what these two share, all share
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))


def token_batches(lengths: list[int], max_tokens: int, batch_size: int | None = None) -> Iterator[list[int]]:
    """Indices of batches of alike lengths, the longest first (memory runs out at once, or not at all).

    Args:
        lengths (`list[int]`): Tokens of each row.
        max_tokens (`int`): Most tokens of a batch, padding included. A longer row is a batch of its own.
        batch_size (`int`, *optional*): Most rows of a batch.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and ((len(batch) + 1) * lengths[batch[0]] > max_tokens or len(batch) == batch_size):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pad_left(rows: list[list[int]], pad_id: int, device: Any = None) -> BatchEncoding:
    """`input_ids` and `attention_mask`, each `torch.LongTensor` of shape `(rows, longest)`."""
    length = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (length - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return BatchEncoding({"input_ids": ids, "attention_mask": mask})
