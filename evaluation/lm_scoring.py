"""What a causal LM thinks of given tokens: log-likelihoods of continuations, in batches of left-padded rows."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from clsgen.batching_clsgen import pad_left, token_batches
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
    for indices, ids, logits in _last_logits(model, rows, lengths, max_batch_tokens, description):
        targets = ids[:, 1 - logits.shape[1] :]
        scores = logits[:, :-1].log_softmax(dim=-1).gather(2, targets[..., None])[..., 0]  # (batch_size, longest)
        for row, i in enumerate(indices):
            found[i] = float(scores[row, -len(continuations[i]) :].double().sum())
    return found


def _last_logits(
    model: Any, rows: list[list[int]], before_last: list[int], max_batch_tokens: int, description: str | None
) -> Iterator[tuple[list[int], torch.LongTensor, torch.FloatTensor]]:
    """Batch by batch: indices of rows, their ids, and the float32 logits of their last positions: the very last, and
    as many before it as `before_last` of some row of the batch asks for."""
    model.eval()
    with tqdm(total=len(rows), desc=description, disable=description is None) as bar:
        for indices in token_batches([len(row) for row in rows], max_batch_tokens, None):
            batch = pad_left([rows[i] for i in indices], 0, model.device)
            # Stock models number the positions of left-padded rows wrongly unless told.
            positions = positions_from_mask(batch["attention_mask"], batch["input_ids"].shape[1])
            kept = 1 + max(before_last[i] for i in indices)
            outputs = model(**batch, position_ids=positions, logits_to_keep=kept)
            yield indices, batch["input_ids"], outputs.logits.float()
            bar.update(len(indices))


@torch.inference_mode()
def answer_log_odds(
    model: Any, prompts: Sequence[list[int]], answers: tuple[list[int], list[int]], description: str | None = None
) -> list[float]:
    """Log-odds of the answer for label 1 against that for label 0, as continuations of each prompt.

    Answers that differ in their last token alone take one pass over the prompts, others two.

    Args:
        model, prompts, description: See [`continuation_log_likelihoods`].
        answers (`tuple[list[int], list[int]]`): Ids of the answers for label 0 and label 1.
    """
    against, in_favour = answers
    if against[:-1] != in_favour[:-1]:
        zeros, ones = (
            continuation_log_likelihoods(model, prompts, [answer] * len(prompts), description=description)
            for answer in answers
        )
        return [one - zero for zero, one in zip(zeros, ones, strict=True)]
    found = [0.0] * len(prompts)
    rows = [[*prompt, *against[:-1]] for prompt in prompts]
    for indices, _, logits in _last_logits(model, rows, [0] * len(rows), MAX_BATCH_TOKENS, description):
        for i, scores in zip(indices, logits[:, -1].double(), strict=True):
            found[i] = float(scores[in_favour[-1]] - scores[against[-1]])
    return found
