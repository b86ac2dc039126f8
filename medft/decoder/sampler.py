"""The order of training rows, in rounds of one kind.

A round is one batch for every process. Its rows are of one kind: equally many images where rows of
a batch would see each other's, else with or without images, since processes that run different
modules in the same round wait for each other for ever under ZeRO-3. With several processes or kinds
a round is always full, so that Accelerate, which shards the batches, has nothing to drop.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

GROUPED_ROUNDS = 50
"""Rounds of drawn rows that are put in order of length together."""


class RoundSampler(Sampler[int]):
    """Indices of rows, every `round_size` of them of the same kind.

    Cut into batches and dealt to the processes in turn, as Trainer and Accelerate do, a round is
    one batch for every process. Each row comes at least once an epoch; what fills the last round
    of a kind comes again. The order depends on seed and epoch only, so that a run that resumes in
    the middle of an epoch goes on in it. Rows of one kind come in the same order whatever the
    round's size.
    """

    def __init__(
        self,
        kinds: Sequence[int],
        *,
        round_size: int,
        seed: int,
        fills: bool,
        lengths: Sequence[int] | None = None,
    ) -> None:
        """Make the sampler.

        Args:
            kinds: of each row.
            round_size: rows a device times devices.
            seed: of the order.
            fills: whether the last round is made full even where it comes last.
            lengths: of each row in tokens, to put rows of similar length into one round.
        """
        self.round_size = round_size
        self.seed = seed
        self.epoch = 0
        self._lengths = None if lengths is None else torch.tensor(lengths)
        of_rows = torch.tensor(kinds)
        self._kinds = [torch.nonzero(of_rows == kind).flatten() for kind in of_rows.unique()]
        self._fills = fills or len(self._kinds) > 1 or lengths is not None

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Indices of an epoch, with those that come again."""
        return sum(len(rows) + self._missing(rows) for rows in self._kinds)

    @property
    def repeats(self) -> int:
        """How many indices of an epoch only fill rounds."""
        return sum(self._missing(rows) for rows in self._kinds)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)) % 2**63)
        rounds: list[torch.Tensor] = []
        for rows in self._kinds:
            drawn = rows[torch.randperm(len(rows), generator=generator)]
            times = -(-self.round_size // len(drawn))
            drawn = torch.cat([drawn, drawn.repeat(times)[: self._missing(rows)]])
            for group in drawn.split(GROUPED_ROUNDS * self.round_size):
                rounds += self._in_order_of_length(group).split(self.round_size)
        if len(self._kinds) > 1 or self._lengths is not None:
            order = torch.randperm(len(rounds), generator=generator)
            rounds = [rounds[index] for index in order.tolist()]
        for indices in rounds:
            yield from indices.tolist()

    def _in_order_of_length(self, rows: torch.Tensor) -> torch.Tensor:
        if self._lengths is None:
            return rows
        return rows[self._lengths[rows].argsort(stable=True)]

    def _missing(self, rows: torch.Tensor) -> int:
        return -len(rows) % self.round_size if self._fills else 0
