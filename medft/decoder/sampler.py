"""The order of training rows, in global batches of one modality.

A global batch is one batch on every process. Its rows are of one modality: the same number of
images where rows would otherwise see each other's, or under ZeRO-3, where processes that run
different modules at the same time deadlock; else with or without images. With several processes,
several modalities or lengths, every global batch is full, so that Accelerate, which shards the
batches, has nothing to drop.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

GROUPED_BATCHES = 50
"""Number of global batches whose rows are sorted by length together."""


class GlobalBatchSampler(Sampler[int]):
    """Row indices, each `global_batch_size` of them of one modality.

    Trainer cuts them into batches and Accelerate deals these to the processes in turn, which gives
    every process one batch of a global batch. Each row occurs at least once per epoch; rows that
    fill the last global batch of a modality repeat. The order is random but determined by seed and
    epoch, so that a resumed run continues in the middle of an epoch. With a single modality and no
    lengths it does not depend on the size of a global batch.
    """

    def __init__(
        self,
        modalities: Sequence[int],
        *,
        global_batch_size: int,
        seed: int,
        fills: bool,
        lengths: Sequence[int] | None = None,
    ) -> None:
        """Make the sampler.

        Args:
            modalities: of each row.
            global_batch_size: rows per device times devices.
            seed: of the order.
            fills: whether to fill the last global batch even with one modality and no lengths.
            lengths: tokens of each row, to put rows of similar length into one global batch.
        """
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.epoch = 0
        self._lengths = None if lengths is None else torch.tensor(lengths)
        of_rows = torch.tensor(modalities)
        self._rows_by_modality = [
            torch.nonzero(of_rows == one).flatten() for one in of_rows.unique()
        ]
        self._fills = fills or len(self._rows_by_modality) > 1 or lengths is not None

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0, which decides the order."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of indices per epoch, repeats included."""
        return sum(len(rows) + self._missing(rows) for rows in self._rows_by_modality)

    @property
    def repeats(self) -> int:
        """Number of indices per epoch that only fill global batches."""
        return sum(self._missing(rows) for rows in self._rows_by_modality)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)) % 2**63)
        batches: list[torch.Tensor] = []
        for rows in self._rows_by_modality:
            drawn = rows[torch.randperm(len(rows), generator=generator)]
            times = -(-self.global_batch_size // len(drawn))
            drawn = torch.cat([drawn, drawn.repeat(times)[: self._missing(rows)]])
            for group in drawn.split(GROUPED_BATCHES * self.global_batch_size):
                batches += self._in_order_of_length(group).split(self.global_batch_size)
        if len(self._rows_by_modality) > 1 or self._lengths is not None:
            order = torch.randperm(len(batches), generator=generator)
            batches = [batches[index] for index in order.tolist()]
        for indices in batches:
            yield from indices.tolist()

    def _in_order_of_length(self, rows: torch.Tensor) -> torch.Tensor:
        if self._lengths is None:
            return rows
        return rows[self._lengths[rows].argsort(stable=True)]

    def _missing(self, rows: torch.Tensor) -> int:
        return -len(rows) % self.global_batch_size if self._fills else 0
