"""What a causal LM thinks of given tokens: log-likelihoods of continuations, in batches of left-padded rows."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import DynamicCache

from clsgen.batching_clsgen import alike, pad_left, token_batches
from clsgen.caching_clsgen import LEAST_TOKENS_SAVED, can_be_padded_within, growing_cache
from clsgen.head_clsgen import positions_from_mask

# Logits of a small vocabulary over this many tokens take 400 MB in float32.
MAX_BATCH_TOKENS = 2048


@torch.inference_mode()
def continuation_log_likelihoods(
    model: Any,
    prompts: Sequence[list[int]],
    continuations: Sequence[list[int]],
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    description: str | None = None,
) -> list[float]:
    """Log-likelihood of each continuation given its prompt, summed over the continuation's tokens, in nats.

    Args:
        model (`PreTrainedModel`): Any causal LM; put into evaluation mode.
        prompts (`Sequence[list[int]]`): Ids, at least one a row.
        continuations (`Sequence[list[int]]`): Ids, at least one a row.
        max_batch_tokens (`int`, *optional*, defaults to 2048): Most tokens of a batch, padding included.
        description (`str`, *optional*): Of a progress bar; none without.

    Returns:
        `list[float]`, one a row, in the order of the rows.

    Raises:
        ValueError: An empty prompt or continuation.
    """
    if not all(prompts) or not all(continuations):
        raise ValueError("Each prompt and each continuation needs a token at least.")
    found = [0.0] * len(prompts)
    rows = [[*prompt, *continuation] for prompt, continuation in zip(prompts, continuations, strict=True)]
    lengths = [len(continuation) for continuation in continuations]
    model.eval()
    with tqdm(total=len(rows), desc=description, disable=description is None) as bar:
        for indices in token_batches([len(row) for row in rows], max_batch_tokens, None):
            batch = pad_left([rows[i] for i in indices], 0, model.device)
            # Stock models number the positions of left-padded rows wrongly unless told.
            positions = positions_from_mask(batch["attention_mask"], batch["input_ids"].shape[1])
            kept = 1 + max(lengths[i] for i in indices)
            logits = model(**batch, position_ids=positions, logits_to_keep=kept).logits.float()
            targets = batch["input_ids"][:, 1 - kept :]
            scores = logits[:, :-1].log_softmax(dim=-1).gather(2, targets[..., None])[..., 0]  # (batch_size, longest)
            for row, i in enumerate(indices):
                found[i] = float(scores[row, -len(continuations[i]) :].double().sum())
            bar.update(len(indices))
    return found


@torch.inference_mode()
def answer_log_odds(
    model: Any, prompts: Sequence[list[int]], answers: tuple[list[int], list[int]], description: str | None = None
) -> list[float]:
    """Log-odds of the answer for label 1 against that for label 0, as continuations of each prompt.

    Prompts are gone through once, and what all of them begin with once for all; each answer then continues what the
    model keeps of them.

    Args:
        model, prompts, description: See [`continuation_log_likelihoods`].
        answers (`tuple[list[int], list[int]]`): Ids of the answers for label 0 and label 1.

    Returns:
        `list[float]`, one a row, in the order of the rows.

    Raises:
        ValueError: An empty prompt or answer.
    """
    if not all(prompts) or not all(answers):
        raise ValueError("Each prompt and each answer needs a token at least.")
    model.eval()
    found = [0.0] * len(prompts)
    shared, cache = _shared_beginning(model, prompts)
    rests = [prompt[shared:] for prompt in prompts]
    with tqdm(total=len(prompts), desc=description, disable=description is None) as bar:
        for indices in token_batches([len(rest) for rest in rests], MAX_BATCH_TOKENS, None):
            beginning = copy.deepcopy(cache)
            if shared:
                beginning.batch_repeat_interleave(len(indices))
            zeros, ones = _answer_log_likelihoods(model, beginning, shared, [rests[i] for i in indices], answers)
            for i, log_odds in zip(indices, (ones - zeros).tolist(), strict=True):
                found[i] = log_odds
            bar.update(len(indices))
    return found


def _shared_beginning(model: Any, prompts: Sequence[list[int]]) -> tuple[int, DynamicCache]:
    """How many ids all prompts begin with that it pays to compute once, and the cache of one row that holds them."""
    cache = growing_cache(model.config.get_text_config())
    length = min(alike(prompts), *(len(prompt) - 1 for prompt in prompts)) if prompts else 0
    if length * (len(prompts) - 1) < LEAST_TOKENS_SAVED or not can_be_padded_within(cache):
        return 0, cache
    model(torch.tensor([prompts[0][:length]], device=model.device), past_key_values=cache, logits_to_keep=1)
    return length, cache


def _answer_log_likelihoods(
    model: Any, cache: DynamicCache, shared: int, rests: list[list[int]], answers: tuple[list[int], list[int]]
) -> list[torch.Tensor]:
    """Of each answer, its log-likelihoods behind a batch of prompts: float64, shape `(len(rests),)`.

    Args:
        cache (`DynamicCache`): Of the `shared` ids that each prompt begins with, a row a prompt; it grows.
        rests (`list[list[int]]`): What comes behind them in each prompt, an id at least.
    """
    batch = pad_left(rests, 0, model.device)
    mask = F.pad(batch["attention_mask"], (shared, 0), value=1)
    positions = positions_from_mask(mask, batch["input_ids"].shape[1])
    first = model(
        batch["input_ids"], attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
    ).logits
    found = []
    for answer in answers:
        ids, logits = torch.tensor([answer] * len(rests), device=model.device), first
        said = ids[:, :-1]
        if said.shape[1]:
            steps = torch.arange(1, said.shape[1] + 1, device=model.device)
            later = model(
                said,
                attention_mask=torch.cat([mask, torch.ones_like(said)], dim=1),
                position_ids=positions[:, -1:] + steps,
                past_key_values=copy.deepcopy(cache),
            ).logits
            logits = torch.cat([first, later], dim=1)
        scores = logits.float().log_softmax(dim=-1).gather(2, ids[..., None])[..., 0]
        found.append(scores.double().sum(dim=1))
    return found
