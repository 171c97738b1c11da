"""In which order training goes through its rows, some of which are for one epoch alone."""

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class EpochSampler(Sampler[int]):
    """Rows of all epochs and those of this one, in an order of seed and epoch alone: a resumed run sees the same.

    It asks for the epoch by itself: on several processes, a resumed run's loader lies too deep below others for
    `set_epoch` of transformers or accelerate to reach what it takes its rows from.

    Args:
        epochs (`list[int | None]`): For each row, the epoch it is for, or `None` for all. An epoch beyond these takes
            the first one's again, and so on.
        seed (`int`): Of the order.
        epoch (`Callable`): Tells the epoch that begins.
        lengths (`list[int]`, *optional*): Of the rows, to group them by.
        batch_size (`int`, *optional*, defaults to 1): Rows of a step, for `lengths`.
    """

    def __init__(
        self,
        epochs: list[int | None],
        seed: int,
        epoch: Callable[[], int],
        lengths: list[int] | None = None,
        batch_size: int = 1,
    ):
        self.seed, self.epoch, self.lengths, self.batch_size = seed, epoch, lengths, batch_size
        always = [i for i, epoch in enumerate(epochs) if epoch is None]
        own = [[i for i, e in enumerate(epochs) if e == epoch] for epoch in sorted({*epochs} - {None})] or [[]]
        self.shares = [always + rows for rows in own]

    def __len__(self) -> int:
        return max(map(len, self.shares))

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch()
        generator = torch.Generator().manual_seed(self.seed + epoch)
        rows = self.shares[epoch % len(self.shares)]
        # Packing may have made one epoch a sequence shorter: `Trainer` counts on epochs of the same length.
        rows = [rows[i % len(rows)] for i in range(len(self))]
        if self.lengths is None:
            order = torch.randperm(len(rows), generator=generator).tolist()
        else:
            lengths = [self.lengths[row] for row in rows]
            order = get_length_grouped_indices(lengths, self.batch_size, generator=generator)
        return (rows[i] for i in order)
