"""Explanations: one prefill gives the number, and its KV cache the words."""

import copy
import math
from collections.abc import Generator, Iterable
from itertools import chain
from threading import Event, Thread
from typing import Any

import torch
from torch.nn import functional as F
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation import GenerationMode
from transformers.utils import logging

from .batching_clsgen import pad_left, pass_tokens, token_batches
from .caching_clsgen import SharedPrefix, can_be_padded_within, growing_cache, joined
from .prompting_clsgen import TaskPrompt

# Options of `generate` that mean the same when a batch is generated in several calls, each from where the last ended.
_RESUMABLE = {
    "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty",
    "no_repeat_ngram_size", "bad_words_ids",
}  # fmt: skip
# Stored options that don't: each call would count anew.
_COUNTED_ANEW = (
    "min_new_tokens", "exponential_decay_length_penalty", "begin_suppress_tokens", "max_time", "stop_strings",
)  # fmt: skip

STREAM_THREAD = "clsgen-stream"
logger = logging.get_logger(__name__)


class _SomeRowsEnded(StoppingCriteria):
    """Stops the whole batch once a share of its rows has ended, so that they can be dropped from it."""

    def __init__(self, stop_ids: torch.LongTensor, share: float = 0.125):
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


class VerdictGuidance(UnbatchedClassifierFreeGuidanceLogitsProcessor):
    """Holds explanations to their verdict lines, by what the LM would write behind the other ones.

    A token that is likely behind this line with `p` and behind the other with `q` scores `log q + scale * (log p - log
    q)`: classifier-free guidance (Sanchez et al., 2023, "Stay on topic with Classifier-Free Guidance").

    An explanation that would end before it has told its verdict goes on for one more sentence: where all its tokens
    together are less than `TOLD` times as likely behind this line as behind the other, its first end is not taken, nor
    another control token in its place.

    Args:
        scale (`float`): 1 changes nothing; the larger, the more a word counts that only this verdict makes likely.
        model ([`ClsGenForCausalLMAndClassification`]): In evaluation mode.
        batch (`dict[str, torch.LongTensor]`): `input_ids` and `attention_mask`, up to and with the other lines.
        cache (`DynamicCache`): Of all but the last of these tokens; it is used up.
    """

    TOLD = 150.0  # chosen on validation, like the scale of the recipe for CliniFact

    def __init__(self, scale: float, model: Any, batch: dict[str, torch.LongTensor], cache: DynamicCache):
        super().__init__(scale, model, batch["input_ids"][:, -1:], batch["attention_mask"])
        self.unconditional_context["past_key_values"] = cache
        self.stop_ids = _stop_ids(model)
        size = model.config.text_config.vocab_size  # a tokenizer may have more ids than the model
        control = [i for i in model.encoder.control_ids if i < size]
        self.no_words = torch.cat([self.stop_ids, self.stop_ids.new_tensor(control)])
        rows = len(batch["input_ids"])
        self.log_ratio = torch.zeros(rows, device=model.device)  # of the tokens so far
        self.held_back = torch.zeros(rows, dtype=torch.bool, device=model.device)
        self._next: torch.FloatTensor | None = None  # what each token would add to `log_ratio`

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self._next is not None:
            self.log_ratio = self.log_ratio + self._next.gather(1, input_ids[:, -1:])[:, 0]
        this = scores.float().log_softmax(dim=-1)
        other = self.get_unconditional_logits(input_ids)[:, -1].float().log_softmax(dim=-1)
        self._next = this - other
        scores = other + self.guidance_scale * self._next
        early = (self.log_ratio < math.log(self.TOLD)) & ~self.held_back
        self.held_back = self.held_back | (early & torch.isin(scores.argmax(dim=-1), self.stop_ids))
        scores[early.nonzero(), self.no_words] = -torch.inf
        return scores

    def select_rows(self, rows: torch.LongTensor) -> None:
        """Drops all rows of the batch but these."""
        context = self.unconditional_context
        context["attention_mask"] = context["attention_mask"][rows]
        context["past_key_values"].batch_select_indices(rows)
        self.log_ratio, self.held_back, self._next = self.log_ratio[rows], self.held_back[rows], self._next[rows]


def _stop_ids(model: Any, options: dict[str, Any] | None = None) -> torch.LongTensor:
    stops = _settled(model.generation_config, options or {}).eos_token_id
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    return torch.tensor(stops, dtype=torch.long, device=model.device)


class _Cancelled(StoppingCriteria):
    """Stops when the reader of a stream has gone."""

    def __init__(self):
        self.event = Event()

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class Prefill:
    """The computed prompts of a batch: the head's logits, and the KV cache to go on from.

    Args:
        model ([`ClsGenForCausalLMAndClassification`]): In evaluation mode.
        prompts (`list[list[int]]`): Ids of a batch.
        prefix ([`SharedPrefix`], *optional*): What they begin with, where it is computed already.
    """

    def __init__(self, model: Any, prompts: list[list[int]], prefix: SharedPrefix | None = None):
        self.model = model
        prefix = prefix or SharedPrefix.of(model, prompts, whole=True)
        self.batch = prefix.pad(model, prompts)
        places = [list(range(len(prompts)))]
        if can_be_padded_within(prefix.cache):
            lengths = [len(prompt) - len(prefix.input_ids) for prompt in prompts]
            places = [sorted(rows) for rows in token_batches(lengths, pass_tokens(model.device))]
        passes = [self._run([prompts[i] for i in rows], prefix) for rows in places]
        cls_logits, caches = zip(*passes, strict=True)
        back = torch.tensor(list(chain(*places))).argsort()
        self.cls_logits = torch.cat(cls_logits).cpu()[back]  # (batch_size,)
        self.cache = joined(list(zip(places, caches, strict=True)), len(prefix.input_ids))
        self.cache.crop(-1)  # it always lacks the last tokens: `generate` needs some to start from
        self._guidance: VerdictGuidance | None = None
        self.readings: torch.FloatTensor | None = None  # what `read_verdicts` found
        self.given: list[int] | None = None  # labels of the verdict lines that were written

    def _run(self, prompts: list[list[int]], prefix: SharedPrefix) -> tuple[torch.Tensor, DynamicCache]:
        """The head's logits at the last tokens of prompts that go into one forward pass, and the cache."""
        batch, past = prefix.batch(self.model, prompts)
        outputs = self.model(**batch, **past, use_cache=True, logits_to_keep=1)
        return outputs.cls_logits[:, -1], past["past_key_values"]

    def copy(self) -> "Prefill":
        """A prefill to go on from in another way than from this one."""
        other = copy.copy(self)
        other.cache, other.batch = copy.deepcopy(self.cache), dict(self.batch)
        return other

    def read_verdicts(self) -> torch.FloatTensor:
        """The LM's own reading: log P(verdict line of label 1) - log P(that of label 0), shape `(batch_size,)`."""
        length, losses = self.length, []
        for line in self._verdict_lines:
            logits = self._append([line] * len(self.cls_logits), logits_to_keep=len(line))
            self._rewind(length)
            targets = torch.tensor(line, device=logits.device).expand(len(logits), -1)
            losses.append(F.cross_entropy(logits.float().mT, targets, reduction="none").sum(dim=1).cpu())
        self.readings = losses[0] - losses[1]
        return self.readings

    def write_verdicts(self, labels: list[int]) -> None:
        """Lets each explanation begin with the verdict line of a label: 0 or 1, one a row."""
        self.given = labels
        scale = self.model.config.explanation_guidance_scale
        if scale != 1:
            other = self.copy()
            other._append([self._verdict_lines[1 - label] for label in labels])
            self._guidance = VerdictGuidance(scale, self.model, other.batch, other.cache)
        self._append([self._verdict_lines[label] for label in labels])

    @property
    def length(self) -> int:
        """Tokens of each row so far, padding included."""
        return self.batch["input_ids"].shape[1]

    @property
    def _verdict_lines(self) -> list[list[int]]:
        return [self.model.encoder.encode_verdict(label) for label in (0, 1)]

    def _append(self, rows: list[list[int]], logits_to_keep: int = 1) -> torch.FloatTensor:
        """Lets each row go on with these ids; returns the logits that predict the last `logits_to_keep` of them."""
        if len({*map(len, rows)}) == 1 or can_be_padded_within(self.cache):
            start = self.length - 1
            new = pad_left(rows, self.model.pad_token_id, self.model.device)
            self.batch = {name: torch.cat([self.batch[name], new[name]], dim=1) for name in new}
        else:  # computed again, so that all padding stands before the prompts
            start, self.cache = 0, growing_cache(self.model.config.text_config)
            prompts = zip(self.batch["input_ids"], self.batch["attention_mask"], strict=True)
            whole = [ids[mask.bool()].tolist() + row for (ids, mask), row in zip(prompts, rows, strict=True)]
            self.batch = dict(pad_left(whole, self.model.pad_token_id, self.model.device))
        ids, mask = self.batch["input_ids"][:, start:-1], self.batch["attention_mask"][:, :-1]
        past = {"past_key_values": self.cache, "logits_to_keep": logits_to_keep}
        return self.model(input_ids=ids, attention_mask=mask, **past).logits

    def _rewind(self, length: int) -> None:
        """Forgets what stands behind the first `length` tokens."""
        self.cache.crop(length - self.length)
        self.batch = {name: values[:, :length] for name, values in self.batch.items()}

    def start(self, generate_kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
        """The arguments of `generate` that go on from here, with the caller's options. They use this prefill up."""
        config, options = self.model.config, dict(generate_kwargs or {})
        if options.get("max_new_tokens", 0) is None:
            del options["max_new_tokens"]
        settled = _settled(self.model.generation_config, options)
        if "max_length" not in options:
            options.setdefault("max_new_tokens", settled.max_new_tokens or 128)
        mode = settled.get_generation_mode(options.get("assistant_model"))
        ours = []
        if self._guidance and mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            ours.append(self._guidance)
        elif self._guidance:
            logger.warning_once(
                f"`explanation_guidance_scale` works with greedy search and sampling, not with {mode.value}: this "
                "explanation is held to its verdict by the verdict line alone."
            )
        if config.explanation_no_repeat_ngram_size:
            ours.append(NoRepeatBehindPrompt(config.explanation_no_repeat_ngram_size, self.length))
        if ours:
            options["logits_processor"] = LogitsProcessorList([*ours, *options.get("logits_processor", ())])
        if mode != GenerationMode.ASSISTED_GENERATION:  # that reads the whole prompt, also what a cache holds already
            if (settled.num_beams or 1) > 1:  # `generate` repeats the ids for its beams, but not a cache
                self.cache.batch_repeat_interleave(settled.num_beams)
            options |= {"past_key_values": self.cache, "use_cache": True}  # MPT's configs say it is not to be used
        return {**self.batch, **options, "return_dict_in_generate": False}

    def explain(self, generate_kwargs: dict[str, Any]) -> list[tuple[int | None, str, bool]]:
        """Explanations of the batch, each as [`split_words`] gives it, and whether it was cut: no stop id ended it.

        Rows that have ended leave the batch while the others go on.
        """
        settled = _settled(self.model.generation_config, generate_kwargs)
        if (settled.num_return_sequences or 1) != 1:
            raise ValueError("`num_return_sequences` must be 1: a prediction holds one explanation.")
        inputs = self.start(generate_kwargs)
        resumable = set(generate_kwargs) <= _RESUMABLE and (settled.num_beams or 1) == 1
        resumable = resumable and not any(getattr(settled, name, None) for name in _COUNTED_ANEW)
        droppable = len(self.cls_logits) > 3 and resumable and _can_lose_rows(self.cache)
        rows = (generate_dropping_ended_rows if droppable else _generate_whole_batch)(self.model, inputs)
        texts = self.model.tokenizer.batch_decode(rows, skip_special_tokens=True)
        given = self.given or [None] * len(texts)
        stops = _stop_ids(self.model, generate_kwargs).tolist()
        return [
            (*split_words(self.model.encoder.prompt, text, label), _cut(ids, stops))
            for text, label, ids in zip(texts, given, rows, strict=True)
        ]


def _cut(ids: list[int], stops: list[int]) -> bool:
    """Whether new ids end without one of `stops`."""
    return not set(stops).intersection(ids)


def split_words(prompt: TaskPrompt, text: str, given: int | None) -> tuple[int | None, str]:
    """What [`TaskPrompt.split_verdict_line`] makes of words; behind a verdict line of `given`, another one stays.

    A model that is told its verdict and then writes the other one contradicts it, which a reader has to see.
    """
    label, words = prompt.split_verdict_line(text)
    return (given, text.strip()) if None not in (label, given) and label != given else (label, words)


def _can_lose_rows(cache: DynamicCache) -> bool:
    """Not where a layer's state is no list of rows that one can take out, as in linear attention."""
    return all(hasattr(layer, "batch_select_indices") for layer in cache.layers)


def _settled(stored: GenerationConfig, options: dict[str, Any]) -> GenerationConfig:
    """What `generate` goes by: `options`, then the generation config among them, then the stored one."""
    config = copy.deepcopy(options.get("generation_config") or stored)
    config.update(**stored.to_dict(), defaults_only=True)
    config.update(**options)
    return config


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
    stop_ids = _stop_ids(model)
    start, end = ids.shape[1], ids.shape[1] + inputs["max_new_tokens"]
    new_ids: list[list[int]] = [[] for _ in ids]
    going = torch.arange(len(ids), device=ids.device)
    while len(going):
        changed = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": end - ids.shape[1]}
        criteria = StoppingCriteriaList([_SomeRowsEnded(stop_ids)])
        ids = model.generate(**{**inputs, **changed, "stopping_criteria": criteria})
        ended = torch.isin(ids[:, start:], stop_ids)
        finished = ended.any(dim=1) if ids.shape[1] < end else torch.ones_like(going, dtype=torch.bool)
        for row in finished.nonzero()[:, 0].tolist():
            length = int(ended[row].int().argmax()) + 1 if ended[row].any() else ids.shape[1] - start
            new_ids[going[row]] = ids[row, start : start + length].tolist()
        keep = (~finished).nonzero()[:, 0]
        going, ids, mask = going[keep], ids[keep], F.pad(mask[keep], (0, ids.shape[1] - mask.shape[1]), value=1)
        cache.batch_select_indices(keep)
        for processor in inputs.get("logits_processor", ()):
            if isinstance(processor, VerdictGuidance):
                processor.select_rows(keep)
    return new_ids


def stream_pieces(
    model: Any, inputs: dict[str, Any], timeout: float | None = None, given: int | None = None
) -> Generator[str, None, tuple[int | None, str, bool]]:
    """Pieces of one explanation while it is generated in a thread; closing the generator ends the generation.

    Args:
        model, inputs: See [`generate_dropping_ended_rows`], with one row.
        timeout (`float`, *optional*): Longest wait for a piece, in seconds.
        given (`int`, *optional*): Label of the verdict line that it begins behind.

    Returns:
        The whole, as [`Prefill.explain`] gives it.
    """
    streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True, timeout=timeout, skip_special_tokens=True)
    cancelled, written, failures = _Cancelled(), [], []
    criteria = StoppingCriteriaList([*inputs.get("stopping_criteria", ()), cancelled])

    @torch.inference_mode()
    def generate() -> None:
        try:
            written.extend(
                _generate_whole_batch(model, {**inputs, "streamer": streamer, "stopping_criteria": criteria})
            )
        except Exception as error:  # handed to the reader, who waits for pieces in another thread
            failures.append(error)
            streamer.end()

    thread = Thread(target=generate, name=STREAM_THREAD, daemon=True)
    thread.start()
    try:
        explanation = yield from _without_verdict_line(streamer, model.encoder.prompt, given)
    finally:
        cancelled.event.set()
        thread.join()
    if failures:
        raise failures[0]
    return *explanation, _cut(written[0], _stop_ids(model, inputs).tolist())


def _without_verdict_line(
    pieces: Iterable[str], prompt: TaskPrompt, given: int | None = None
) -> Generator[str, None, tuple[int | None, str]]:
    """Yields what [`split_words`] leaves of a text that comes in pieces, and returns what it finds."""
    text, told = "", 0
    for piece in pieces:
        text += piece
        words = "" if prompt.may_become_verdict_line(text) else split_words(prompt, text, given)[1]
        if len(words) > told:
            yield words[told:]
            told = len(words)
    label, words = split_words(prompt, text, given)
    if len(words) > told:
        yield words[told:]
    return label, words
