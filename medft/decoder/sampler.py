"""The order of training rows, in global batches of one modality.

A global batch is one batch for every process. Its rows are of one modality: equally many images
where rows of a batch would see each other's, else with or without images, since processes that run
different modules at the same time wait for each other for ever under ZeRO-3. With several processes
or modalities a global batch is always full, so that Accelerate, which shards the batches, has
nothing to drop.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

GROUPED_BATCHES = 50
"""Global batches of drawn rows that are put in order of length together."""


class GlobalBatchSampler(Sampler[int]):
    """Indices of rows, every `global_batch_size` of them of the same modality.

    Cut into batches and dealt to the processes in turn, as Trainer and Accelerate do, these are one
    batch for every process. Each row comes at least once an epoch; what fills the last global batch
    of a modality comes again. The order depends on seed and epoch only, so that a run that resumes
    in the middle of an epoch goes on in it. Rows of one modality come in the same order whatever
    the size of a global batch.
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
            global_batch_size: rows a device times devices.
            seed: of the order.
            fills: whether the last global batch is made full even where it comes last.
            lengths: of each row in tokens, to put rows of similar length into one global batch.
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
        """Choose the order of an epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Indices of an epoch, with those that come again."""
        return sum(len(rows) + self._missing(rows) for rows in self._rows_by_modality)

    @property
    def repeats(self) -> int:
        """How many indices of an epoch only fill global batches."""
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
