"""The classification head: linear and float32, on hidden states of any layers, at the decision token or pooled."""

import torch
from torch import nn
from torch.nn import functional as F


def positions_from_mask(attention_mask: torch.Tensor, length: int) -> torch.LongTensor:
    """Position of each of the last `length` tokens among its row's real ones, shape `(batch_size, length)`."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -length:]


def pads_behind(attention_mask: torch.Tensor) -> bool:
    """Whether all padding stands behind the rows (`False` where that can't be read: while compiling).

    Args:
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): 0 at padding.
    """
    compiling = torch.compiler.is_compiling()
    return not compiling and bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())


def running_sum(
    scores: torch.FloatTensor,
    mask: torch.Tensor,
    position_ids: torch.LongTensor,
    past_scores: torch.FloatTensor | None = None,
) -> torch.FloatTensor:
    """Sum over each token's own sequence up to and with that token; divided by `position_ids + 1`, the mean.

    Args:
        scores (`torch.FloatTensor` of shape `(batch_size, sequence_length)`).
        mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): 0 at padding.
        position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Restart at 0 where a new sequence
            starts in a packed row.
        past_scores (`torch.FloatTensor` of shape `(batch_size,)`, *optional*): The sum over tokens of earlier calls,
            for rows whose positions go on.
    """
    scores = scores * mask
    totals = scores.cumsum(dim=-1)
    index = torch.arange(1, scores.shape[1] + 1, device=scores.device).expand_as(position_ids)
    starts = torch.where((position_ids == 0) & mask.bool(), index, 0).cummax(dim=-1).values  # 0: before this call
    before = F.pad(totals - scores, (1, 0)).gather(1, starts)
    if past_scores is not None:
        before = torch.where(starts == 0, -past_scores.to(totals)[:, None], before)
    return totals - before


class ClassificationHead(nn.Linear):
    """A linear head on several hidden states, some pooled; always float32.

    It is applied before pooling, to every position: the mean of scores is the score of the mean, shapes stay static,
    and packed rows need no special case.

    Args:
        hidden_size (`int`): Of each hidden state.
        num_reads (`int`): How many of them there are.
        bias (`bool`, *optional*, defaults to `True`): Whether there is a constant term.
    """

    def __init__(self, hidden_size: int, num_reads: int, device: torch.device | None = None, bias: bool = True):
        super().__init__(num_reads * hidden_size, 1, bias=bias, device=device, dtype=torch.float32)

    def reset_parameters(self) -> None:
        """Zero: an untrained head says 0.5."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        hidden_states: list[torch.FloatTensor],
        poolings: list[str],
        mask: torch.Tensor | None,
        position_ids: torch.LongTensor,
        past_scores: torch.FloatTensor | None = None,
        dropout: float = 0.0,
    ) -> tuple[torch.FloatTensor, torch.FloatTensor | None]:
        """
        Args:
            hidden_states (`list[torch.FloatTensor]`): One a read, `(batch_size, sequence_length, hidden_size)`.
            poolings (`list[str]`): `"decision"` or `"mean"`, one a read.
            mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 0 at padding.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)` or `(1, sequence_length)`).
            past_scores (`torch.FloatTensor` of shape `(batch_size,)`, *optional*): As in [`ClsGenOutput`].
            dropout (`float`, *optional*, defaults to 0.0): On the pooled features, while training.

        Returns:
            Each position's logit, as if it were the decision token (`torch.FloatTensor` of shape
            `(batch_size, sequence_length)`), and `cls_past_scores` of [`ClsGenOutput`].
        """
        weights = self.weight.float()[0].chunk(len(hidden_states))
        logits, to_average = 0.0 if self.bias is None else self.bias.float(), None
        for hidden, weight, pooling in zip(hidden_states, weights, poolings, strict=True):
            scores = self._scores(hidden, weight, dropout)
            if pooling == "decision":
                logits = logits + scores
            else:
                to_average = scores if to_average is None else to_average + scores
        if to_average is None:
            return logits, None
        position_ids = position_ids.expand_as(to_average)
        mask = torch.ones_like(to_average) if mask is None else mask.to(to_average)
        sums = running_sum(to_average, mask, position_ids, past_scores)
        return logits + sums / (position_ids + 1), sums[:, -1]

    def _scores(self, hidden: torch.FloatTensor, weight: torch.FloatTensor, dropout: float) -> torch.FloatTensor:
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(weight.device, torch.float32)
            if self.training and dropout > 0:
                # One mask a row is dropout on the pooled features, since pooling and head are linear.
                kept = F.dropout(weight.expand(hidden.shape[0], -1), dropout)
                return torch.einsum("bth,bh->bt", hidden, kept)
            return hidden @ weight
