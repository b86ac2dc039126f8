"""The order of training rows, in global batches of one modality.

A global batch is one batch on every process. Its rows are of one modality: the same number of
images where rows would otherwise see each other's, or under ZeRO-3, where processes that run
different modules at the same time deadlock; else with or without images. With several processes
every global batch is full, so that Accelerate, which deals the batches, has nothing to drop; with
one, the last batch of a modality is as short as its rows leave it.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

GROUPED_BATCHES = 50
"""Number of global batches whose rows are sorted by length together."""


class GlobalBatchSampler(Sampler[list[int]]):
    """Batches of row indices, `num_processes` in a row of one modality: one global batch.

    Accelerate deals the batches to the processes in turn, which gives every process one batch of a
    global batch. Each row occurs at least once per epoch; with several processes, rows that fill
    the last global batch of a modality repeat. The order is random but determined by seed and
    epoch, so that a resumed run continues in the middle of an epoch. With a single modality and no
    lengths it does not depend on the size of a global batch.
    """

    drop_last = False
    """As of torch's BatchSampler, which Accelerate reads."""

    def __init__(
        self,
        modalities: Sequence[int],
        *,
        batch_size: int,
        num_processes: int,
        seed: int,
        lengths: Sequence[int] | None = None,
    ) -> None:
        """Make the sampler.

        Args:
            modalities: of each row.
            batch_size: rows per device.
            num_processes: devices; with several, every batch is filled.
            seed: of the order.
            lengths: tokens of each row, to put rows of similar length into one global batch.
        """
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self._global_batch_size = batch_size * num_processes
        self._fills = num_processes > 1
        self._lengths = None if lengths is None else torch.tensor(lengths)
        of_rows = torch.tensor(modalities)
        self._rows_by_modality = [
            torch.nonzero(of_rows == one).flatten() for one in of_rows.unique()
        ]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0, which decides the order."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of batches per epoch, of all processes."""
        return sum(
            -(-(len(rows) + self._missing(rows)) // self.batch_size)
            for rows in self._rows_by_modality
        )

    @property
    def repeats(self) -> int:
        """Number of indices per epoch that only fill global batches."""
        return sum(self._missing(rows) for rows in self._rows_by_modality)

    @property
    def most_repeated(self) -> int:
        """How often the row that is repeated most occurs per epoch."""
        return max(1 + -(-self._missing(rows) // len(rows)) for rows in self._rows_by_modality)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)) % 2**63)
        global_batches: list[torch.Tensor] = []
        for rows in self._rows_by_modality:
            drawn = rows[torch.randperm(len(rows), generator=generator)]
            times = -(-self._global_batch_size // len(drawn))
            drawn = torch.cat([drawn, drawn.repeat(times)[: self._missing(rows)]])
            for group in drawn.split(GROUPED_BATCHES * self._global_batch_size):
                global_batches += self._in_order_of_length(group).split(self._global_batch_size)
        if len(self._rows_by_modality) > 1 or self._lengths is not None:
            order = torch.randperm(len(global_batches), generator=generator)
            global_batches = [global_batches[index] for index in order.tolist()]
        for indices in global_batches:
            yield from (batch.tolist() for batch in indices.split(self.batch_size))

    def _in_order_of_length(self, rows: torch.Tensor) -> torch.Tensor:
        if self._lengths is None:
            return rows
        return rows[self._lengths[rows].argsort(stable=True)]

    def _missing(self, rows: torch.Tensor) -> int:
        return -len(rows) % self._global_batch_size if self._fills else 0
