"""KV caches for batches: tensors that grow in place, and a beginning that all prompts share."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import BatchEncoding, DynamicCache
from transformers.cache_utils import DynamicLayer

from .batching_clsgen import alike, pad_left

ROOM = 64  # tokens
LEAST_TOKENS_SAVED = 128  # about what one more forward pass costs besides its tokens


class GrowingLayer(DynamicLayer):
    """A [`DynamicLayer`] that appends in place: `DynamicLayer` copies the whole cache for every new token.

    `keys` and `values` are the filled part of larger tensors. Whatever replaces them (dropping rows, repeating them
    for beams) is noticed by its place in memory, and new room is made.
    """

    _rooms: tuple[torch.Tensor, torch.Tensor] | None = None

    def fill(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        """Takes over tensors of shape `(batch_size, num_heads, length or more, head_dim)`; what is behind is room."""
        self._rooms = (keys, values)
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends states of shape `(batch_size, num_heads, new_tokens, head_dim)`; returns all there are."""
        if not self.is_initialized or self.keys.numel() == 0:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        rooms = self._rooms or (None, None)
        kept = (self.keys, self.values)
        new = (key_states, value_states)
        end = self.keys.shape[2] + key_states.shape[2]
        self.fill(*(_with_room(*each) for each in zip(rooms, kept, new, strict=True)), end)
        return self.keys, self.values


def _with_room(room: torch.Tensor | None, kept: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """`kept` and `new` at the beginning of a larger tensor: of `room`, where `kept` lies in it and `new` fits."""
    start, end = kept.shape[2], kept.shape[2] + new.shape[2]
    fits = room is not None and end <= room.shape[2] and len(kept) == len(room) and kept.data_ptr() == room.data_ptr()
    if not fits:
        room = new.new_empty((*new.shape[:2], end + ROOM, new.shape[3]))
        room[:, :, :start] = kept
    room[:, :, start:end] = new
    return room


# Backbones whose attention takes distances from places in the cache (ALiBi without the mask, local windows).
_COUNTING_SLOTS = {"mpt", "gpt_neo"}


def growing_cache(config: Any) -> DynamicCache:
    """An empty cache for the decoder of `config`, whose layers grow in place (those with a sliding window as ever)."""
    cache = DynamicCache(config=config)
    if config.model_type not in _COUNTING_SLOTS:
        cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    cache.activate_past_recording()  # sliding windows can be cropped then
    return cache


def can_be_padded_within(cache: DynamicCache) -> bool:
    """Whether padding may stand between cached tokens; a sliding window would count it, and so do some backbones."""
    return all(type(layer) is GrowingLayer for layer in cache.layers)


def joined(parts: list[tuple[list[int], DynamicCache]], beginning: int) -> DynamicCache:
    """The rows of several batches in one cache.

    Args:
        parts (`list[tuple[list[int], DynamicCache]]`): Each batch's place among the rows, and its cache, which is used
            up; several of them have growing layers alone.
        beginning (`int`): Tokens that no padding comes before. Shorter batches are padded behind them.
    """
    whole = parts[0][1]
    if len(parts) == 1:
        return whole
    places = [rows for rows, _ in parts]
    for _ in range(len(whole.layers)):
        layers = [cache.layers.pop(0) for _, cache in parts]  # so that memory holds one layer twice, not all
        length = max(layer.get_seq_length() for layer in layers)
        keys = _padded_behind(beginning, places, [layer.keys for layer in layers], length)
        values = _padded_behind(beginning, places, [layer.values for layer in layers], length)
        layers[0].fill(keys, values, length)
        whole.layers.append(layers[0])
    return whole


def _padded_behind(beginning: int, places: list[list[int]], states: list[torch.Tensor], length: int) -> torch.Tensor:
    """States of shape `(rows, num_heads, tokens, head_dim)` of several batches in one tensor, with room at its end."""
    _, heads, _, size = states[0].shape
    room = states[0].new_zeros((sum(map(len, places)), heads, length + ROOM, size))
    for rows, each in zip(places, states, strict=True):
        room[rows, :, :beginning] = each[:, :, :beginning]
        room[rows, :, length - each.shape[2] + beginning : length] = each[:, :, beginning:]
    return room


@dataclass(frozen=True)
class SharedPrefix:
    """What prompts begin with alike, computed once for all of them; with no ids, nothing.

    Args:
        input_ids (`list[int]`): The ids.
        cache (`DynamicCache`, *optional*): Of one row; `None` where nothing is shared and nothing will be generated.
        past_scores (`torch.FloatTensor` of shape `(1,)`, *optional*): As in [`ClsGenOutput`].
    """

    input_ids: list[int]
    cache: DynamicCache | None
    past_scores: torch.FloatTensor | None = None

    @classmethod
    @torch.inference_mode()
    def of(cls, model: Any, prompts: list[list[int]], whole: bool) -> "SharedPrefix":
        """What `prompts` begin with alike, if computing it once saves anything.

        Args:
            model ([`ClsGenForCausalLMAndClassification`]): In evaluation mode.
            prompts (`list[list[int]]`): Ids. Each keeps at least its last token.
            whole (`bool`): Whether generation goes on from here; else only the layers below the head are run.
        """
        length = min(alike(prompts), *(len(prompt) - 1 for prompt in prompts))
        cache = growing_cache(model.config.text_config)
        if not can_be_padded_within(cache) or length * (len(prompts) - 1) < LEAST_TOKENS_SAVED:
            return cls([], cache if whole else None)
        ids = prompts[0][:length]
        batch = pad_left([ids], model.pad_token_id, model.device)
        if whole:
            past_scores = model(**batch, past_key_values=cache, use_cache=True, logits_to_keep=1).cls_past_scores
        else:
            past_scores = model.run_to_head(**batch, past_key_values=cache)[1]
        return cls(ids, cache, past_scores)

    def pad(self, model: Any, prompts: list[list[int]]) -> BatchEncoding:
        """Whole prompts as a batch, whose padding stands between this and what follows it."""
        length = len(self.input_ids)
        batch = pad_left([prompt[length:] for prompt in prompts], model.pad_token_id, model.device)
        beginning = batch["input_ids"].new_tensor(self.input_ids).expand(len(prompts), -1)
        batch["input_ids"] = torch.cat([beginning, batch["input_ids"]], dim=1)
        batch["attention_mask"] = F.pad(batch["attention_mask"], (length, 0), value=1)
        return batch

    def batch(self, model: Any, prompts: list[list[int]]) -> tuple[BatchEncoding, dict[str, Any]]:
        """Prompts that begin with this, as a batch to go on from it.

        Returns:
            What [`pad`] gives, without the ids that are computed already; and the arguments of `forward` that hold
            those.
        """
        length, rows = len(self.input_ids), len(prompts)
        batch = self.pad(model, prompts)
        batch["input_ids"] = batch["input_ids"][:, length:]
        cache = copy.deepcopy(self.cache)
        if length and rows > 1:
            cache.batch_repeat_interleave(rows)
        past_scores = None if self.past_scores is None else self.past_scores.expand(rows)
        return batch, {"past_key_values": cache, "cls_past_scores": past_scores}
