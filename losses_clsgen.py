"""The losses, each a sum over this batch divided by a count that may be the whole optimizer step's."""

import torch
from torch.nn import functional as F

from .batching_clsgen import alike

IGNORE_INDEX = -100


def supervised_positions(labels: torch.LongTensor) -> torch.BoolTensor:
    """Positions from which a labelled token is predicted, for `logits_to_keep`.

    Args:
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): -100 where there is no label.

    Returns:
        `torch.BoolTensor` of shape `(batch_size, sequence_length)`.
    """
    return F.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))


def language_modeling_loss(
    logits: torch.FloatTensor,
    labels: torch.LongTensor,
    logits_to_keep: int | torch.LongTensor = 0,
    num_items: torch.Tensor | int | None = None,
) -> torch.FloatTensor:
    """Cross-entropy of the next token, summed over labelled tokens and divided by `num_items` (default: their number).

    Args:
        logits (`torch.FloatTensor` of shape `(batch_size, kept_positions, vocab_size)`): Or, where `logits_to_keep` is
            a mask, of shape `(kept_positions, vocab_size)`.
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Not shifted.
        logits_to_keep: As given to the model: which positions `logits` holds.
        num_items: Number of labelled tokens in the whole optimizer step.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    if isinstance(logits_to_keep, torch.Tensor):
        targets = targets[logits_to_keep] if logits_to_keep.dim() == 2 else targets[:, logits_to_keep]
    elif logits_to_keep:
        targets = targets[:, -logits_to_keep:]
    if num_items is None:
        num_items = (targets != IGNORE_INDEX).sum()
    total = F.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    return total / torch.as_tensor(num_items).clamp(min=1)


def classification_loss(
    cls_logits: torch.FloatTensor,
    cls_labels: torch.FloatTensor,
    pos_weight: float = 1.0,
    num_decisions: torch.Tensor | int | None = None,
) -> torch.FloatTensor:
    """Binary cross-entropy, summed over decisions and divided by `num_decisions` (default: their number).

    Args:
        cls_logits, cls_labels (`torch.FloatTensor` of shape `(batch_size, sequence_length)`): Labels in [0, 1] at
            decision tokens, -100 elsewhere.
        pos_weight (`float`): Weight of the positive class.
        num_decisions: Number of decisions in the whole optimizer step.
    """
    is_decision = cls_labels != IGNORE_INDEX
    if num_decisions is None:
        num_decisions = is_decision.sum()
    # Elementwise with zero weights, not an index: shapes stay static (torch.compile), and the head stays in the graph
    # of a rank without a label (DDP would wait for its gradients forever).
    losses = F.binary_cross_entropy_with_logits(
        cls_logits,
        torch.where(is_decision, cls_labels, 0.0).to(cls_logits.dtype),
        pos_weight=torch.tensor(pos_weight, dtype=cls_logits.dtype, device=cls_logits.device),
        reduction="none",
    )
    return (losses * is_decision).sum() / torch.as_tensor(num_decisions).clamp(min=1)


def verdict_positions(verdicts: torch.BoolTensor, lines: list[list[int]]) -> torch.BoolTensor:
    """Positions from which the token is predicted by which the verdict lines differ, for `logits_to_keep`.

    Args:
        verdicts (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): True at decision tokens that a verdict
            line follows, or what its two forms begin with alike.
        lines (`list[list[int]]`): Ids of the verdict lines of label 0 and label 1.

    Returns:
        `torch.BoolTensor` of shape `(batch_size, sequence_length)`.
    """
    return F.pad(verdicts, (alike(lines), 0))[:, : verdicts.shape[1]]


def verdict_loss(
    logits: torch.FloatTensor,
    probabilities: torch.FloatTensor,
    lines: list[list[int]],
    num_verdicts: torch.Tensor | int | None = None,
) -> torch.FloatTensor:
    """Cross-entropy of the LM's own verdict against the head's probability: the LM learns to say what the head found.

    It is that of one token, by which the lines of both labels first differ, over the whole vocabulary: the odds of the
    two alone could be learned while neither of them is likely. A soft target tells more than a label (Hinton et al.,
    2015, "Distilling the Knowledge in a Neural Network"), and there is one for a text without a label.

    Args:
        logits (`torch.FloatTensor` of shape `(verdicts, vocab_size)`): The LM's at [`verdict_positions`].
        probabilities (`torch.FloatTensor` of shape `(verdicts,)`): The head's, of label 1; no gradient goes there.
        lines (`list[list[int]]`): Ids of the verdict lines of label 0 and label 1.
        num_verdicts: Number of verdicts in the whole optimizer step, which the sum is divided by (default: of these).
    """
    place = alike(lines)
    negative, positive = (logits.float().log_softmax(dim=-1)[:, line[place]] for line in lines)
    probabilities = probabilities.detach().to(positive)
    total = -(probabilities * positive + (1 - probabilities) * negative).sum()
    return total / torch.as_tensor(len(logits) if num_verdicts is None else num_verdicts).clamp(min=1)
