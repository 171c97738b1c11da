"""Explanations: one prefill gives the number, and its KV cache the words."""

import copy
from collections.abc import Iterator
from functools import cached_property
from threading import Event, Thread
from typing import Any

import torch
from torch.nn import functional as F
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from .batching_clsgen import pad_left
from .caching_clsgen import SharedPrefix
from .prompting_clsgen import VERDICT_PREFIX, EncodedPrompt

# Options of `generate` that mean the same when a batch is generated in several calls, each from where the last ended.
_RESUMABLE = {
    "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty",
    "no_repeat_ngram_size", "bad_words_ids",
}  # fmt: skip


STREAM_THREAD = "clsgen-stream"


class _SomeRowsEnded(StoppingCriteria):
    """Stops the whole batch once a share of its rows has ended, so that they can be dropped from it."""

    def __init__(self, stop_ids: torch.LongTensor, share: float = 0.25):
        self.stop_ids = stop_ids
        self.share = share
        self.ended: torch.BoolTensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs) -> torch.BoolTensor:
        ended = torch.isin(input_ids[:, -1], self.stop_ids)
        self.ended = ended if self.ended is None else self.ended | ended
        return (self.ended.float().mean() >= self.share).expand(len(input_ids))


class NoRepeatBehindPrompt(LogitsProcessor):
    """Forbids what would make `ngram_size` tokens stand twice behind the first `start` ones, for all rows at once."""

    def __init__(self, ngram_size: int, start: int):
        self.ngram_size = ngram_size
        self.start = start

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        new = input_ids[:, self.start :]
        if new.shape[1] < self.ngram_size:
            return scores
        ngrams = new.unfold(1, self.ngram_size, 1)  # (batch_size, ngrams, ngram_size)
        last = new[:, None, new.shape[1] - self.ngram_size + 1 :]
        rows, places = (ngrams[:, :, :-1] == last).all(dim=-1).nonzero(as_tuple=True)
        scores = scores.clone()
        scores[rows, ngrams[rows, places, -1]] = -torch.inf
        return scores


class _Cancelled(StoppingCriteria):
    """Stops when the reader of a stream has gone."""

    def __init__(self):
        self.event = Event()

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class Prefill:
    """The computed prompts of a batch: the head's logits, the LM's own reading, and the KV cache to go on from.

    Args:
        model ([`ClsGenForCausalLMAndClassification`]): In evaluation mode.
        prompts (`list[EncodedPrompt]`): A batch.
        prefix ([`SharedPrefix`], *optional*): What they begin with, where it is computed already.
    """

    def __init__(self, model: Any, prompts: list[EncodedPrompt], prefix: SharedPrefix | None = None):
        self.model = model
        ids = [prompt.input_ids for prompt in prompts]
        prefix = prefix or SharedPrefix.of(model, ids, whole=True)
        rest, past = prefix.batch(model, ids)
        outputs = model(**rest, **past, use_cache=True, logits_to_keep=1)
        self.cache = past["past_key_values"]
        beginning = rest["input_ids"].new_tensor(prefix.input_ids).expand(len(ids), -1)
        self.batch = {**rest, "input_ids": torch.cat([beginning, rest["input_ids"]], dim=1)}
        self.cls_logits = outputs.cls_logits[:, -1].cpu()  # (batch_size,)
        self._next_logits = outputs.logits  # (batch_size, 1, vocab_size)

    @cached_property
    def lm_probabilities(self) -> torch.FloatTensor:
        """P(verdict of 1) / (P(verdict of 0) + P(verdict of 1)) by the LM, shape `(batch_size,)`."""
        scores = []
        for label in (0, 1):
            verdict = torch.tensor([self.model.encoder.encode_verdict(label)], device=self.model.device)
            verdict = verdict.expand(len(self.cls_logits), -1)
            given, logits = verdict[:, :-1], self._next_logits
            if given.shape[1]:
                mask = F.pad(self.batch["attention_mask"], (0, given.shape[1]), value=1)
                following = self.model(input_ids=given, attention_mask=mask, past_key_values=self.cache)
                logits = torch.cat([logits, following.logits], dim=1)
                self.cache.crop(-given.shape[1])
            log_probabilities = logits.float().log_softmax(dim=-1)
            scores.append(log_probabilities.gather(2, verdict[..., None]).sum(dim=(1, 2)))
        return torch.sigmoid(scores[1] - scores[0])

    def start(
        self, labels: list[int] | None, generate_kwargs: dict[str, Any] | None = None, keep: bool = False
    ) -> dict[str, Any]:
        """The arguments of `generate` that go on from here.

        Args:
            labels (`list[int]`, *optional*): Whose verdict lines come first; `None` for no hint.
            generate_kwargs (`dict`, *optional*): The caller's options.
            keep (`bool`, *optional*, defaults to `False`): Whether this prefill is used again after.
        """
        config, options = self.model.config, dict(generate_kwargs or {})
        cache = copy.deepcopy(self.cache) if keep else self.cache
        batch = dict(self.batch)
        if labels is None:
            cache.crop(-1)  # the cache holds the whole prompt, and generate needs a token to start from
        else:
            lines = [self.model.encoder.encode_verdict(label) for label in labels]
            verdicts = pad_left(lines, self.model.pad_token_id, self.model.device)
            batch = {name: torch.cat([batch[name], verdicts[name]], dim=1) for name in batch}
        if "max_length" not in options:
            options.setdefault("max_new_tokens", self.model.generation_config.max_new_tokens or 128)
        if config.explanation_no_repeat_ngram_size:
            ours = NoRepeatBehindPrompt(config.explanation_no_repeat_ngram_size, batch["input_ids"].shape[1])
            options["logits_processor"] = LogitsProcessorList([ours, *options.get("logits_processor", ())])
        return {**batch, **options, "past_key_values": cache, "return_dict_in_generate": False}

    def explain(self, labels: list[int] | None, generate_kwargs: dict[str, Any], keep: bool = False) -> list[str]:
        """Explanations of the batch; rows that have ended leave it while the others go on."""
        if generate_kwargs.get("num_return_sequences", 1) != 1:
            raise ValueError("`num_return_sequences` must be 1: a prediction holds one explanation.")
        inputs = self.start(labels, generate_kwargs, keep)
        if generate_kwargs.get("num_beams", 1) > 1:  # `generate` repeats the ids for its beams, but not a cache
            inputs["past_key_values"].batch_repeat_interleave(generate_kwargs["num_beams"])
        droppable = len(self.cls_logits) > 3 and set(generate_kwargs) <= _RESUMABLE
        rows = (generate_dropping_ended_rows if droppable else _generate_whole_batch)(self.model, inputs)
        texts = self.model.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [self.model.encoder.prompt.strip_verdict_line(text) for text in texts]


def _generate_whole_batch(model: Any, inputs: dict[str, Any]) -> list[list[int]]:
    return model.generate(**inputs)[:, inputs["input_ids"].shape[1] :].tolist()


def generate_dropping_ended_rows(model: Any, inputs: dict[str, Any]) -> list[list[int]]:
    """`model.generate`, but a row that has ended is dropped from the batch, not padded until the slowest ends.

    Args:
        model (`PreTrainedModel`): With a generation config that names its eos tokens.
        inputs (`dict`): For `generate`, with `input_ids`, `attention_mask`, `max_new_tokens` and `past_key_values` (a
            `DynamicCache` of all but the last token).

    Returns:
        `list[list[int]]`: New ids of each row, up to and with its eos token.
    """
    ids, mask, cache = inputs["input_ids"], inputs["attention_mask"], inputs["past_key_values"]
    stops = model.generation_config.eos_token_id
    stop_ids = torch.tensor(stops if isinstance(stops, list) else [-1 if stops is None else stops], device=ids.device)
    start, end = ids.shape[1], ids.shape[1] + inputs["max_new_tokens"]
    new_ids: list[list[int]] = [[] for _ in ids]
    going = torch.arange(len(ids), device=ids.device)
    while len(going):
        changed = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": end - ids.shape[1]}
        criteria = StoppingCriteriaList([_SomeRowsEnded(stop_ids)])
        ids = model.generate(**{**inputs, **changed, "stopping_criteria": criteria})
        ended = torch.isin(ids[:, start:], stop_ids)
        finished = ended.any(dim=1) if ids.shape[1] < end else torch.ones_like(going, dtype=torch.bool)
        if not finished.any():  # something else ended it, such as stop strings of the stored generation config
            finished = torch.ones_like(finished)
        for row in finished.nonzero()[:, 0].tolist():
            length = int(ended[row].int().argmax()) + 1 if ended[row].any() else ids.shape[1] - start
            new_ids[going[row]] = ids[row, start : start + length].tolist()
        keep = (~finished).nonzero()[:, 0]
        going, ids, mask = going[keep], ids[keep], F.pad(mask[keep], (0, ids.shape[1] - mask.shape[1]), value=1)
        cache.batch_select_indices(keep)
    return new_ids


def stream_pieces(model: Any, inputs: dict[str, Any], timeout: float | None = None) -> Iterator[str]:
    """Pieces of one explanation while it is generated in a thread; closing the iterator ends the generation.

    Args:
        model, inputs: See [`generate_dropping_ended_rows`], with one row.
        timeout (`float`, *optional*): Longest wait for a piece, in seconds.
    """
    streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True, timeout=timeout, skip_special_tokens=True)
    cancelled, failures = _Cancelled(), []
    criteria = StoppingCriteriaList([*inputs.get("stopping_criteria", ()), cancelled])

    @torch.inference_mode()
    def generate() -> None:
        try:
            model.generate(**{**inputs, "streamer": streamer, "stopping_criteria": criteria})
        except Exception as error:  # handed to the reader, who waits for pieces in another thread
            failures.append(error)
            streamer.end()

    thread = Thread(target=generate, name=STREAM_THREAD, daemon=True)
    thread.start()
    try:
        yield from _without_verdict_line(streamer)
    finally:
        cancelled.event.set()
        thread.join()
    if failures:
        raise failures[0]


def _without_verdict_line(pieces: Iterator[str]) -> Iterator[str]:
    """The pieces, without a leading verdict line and white space."""
    held: str | None = ""
    for piece in pieces:
        if held is None:
            yield piece
            continue
        held = (held + piece).lstrip()
        if held.startswith(VERDICT_PREFIX):
            _, newline, rest = held.partition("\n")
            held = rest.lstrip() if newline else held
            if not newline:
                continue
        elif VERDICT_PREFIX.startswith(held):
            continue
        if held:
            yield held
            held = None
    if held and not held.startswith(VERDICT_PREFIX):
        yield held
