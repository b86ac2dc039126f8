"""The order of training rows where some have more images than others.

Rows of one batch must have equally many images, since Mllama's rows attend to what the longest
of them is padded to. All processes must also take such a batch in the same round: the shapes of a
round would differ else, and Accelerate drops rounds when it shards batches of uneven size.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class ImageCountSampler(Sampler[int]):
    """Indices of rows, every `round_size` of them with the same number of images.

    Cut into batches and dealt to the processes in turn, as Trainer and Accelerate do, a round is
    one batch for every process. Each row comes at least once an epoch; what fills the last round
    of a kind comes twice. The order depends on seed and epoch only, so that a run that resumes in
    the middle of an epoch goes on in it.
    """

    def __init__(self, image_counts: Sequence[int], *, round_size: int, seed: int) -> None:
        """Make the sampler.

        Args:
            image_counts: of each row.
            round_size: rows a device times devices.
            seed: of the order.
        """
        self.round_size = round_size
        self.seed = seed
        self.epoch = 0
        self._kinds = [
            torch.tensor([i for i, count in enumerate(image_counts) if count == kind])
            for kind in sorted(Counter(image_counts))
        ]

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Indices of an epoch, with those that come twice."""
        return sum(len(rows) + self._missing(rows) for rows in self._kinds)

    @property
    def repeats(self) -> int:
        """Rows that come once more in an epoch, to fill rounds."""
        return sum(self._missing(rows) for rows in self._kinds)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)) % 2**63)
        rounds = []
        for rows in self._kinds:
            drawn = rows[torch.randperm(len(rows), generator=generator)]
            filler = drawn.repeat(-(-self.round_size // len(drawn)))[: self._missing(rows)]
            rounds += torch.cat([drawn, filler]).split(self.round_size)
        for index in torch.randperm(len(rounds), generator=generator).tolist():
            yield from rounds[index].tolist()

    def _missing(self, rows: torch.Tensor) -> int:
        return -len(rows) % self.round_size
