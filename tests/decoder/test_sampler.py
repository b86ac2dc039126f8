"""Rows with no, one and two images: equal numbers in a round, and every row in an epoch."""

from collections import Counter

import pytest
from torch.utils.data import BatchSampler

from medft.decoder.sampler import RoundSampler

COUNTS = [1] * 23 + [2] * 8 + [0] * 3


@pytest.fixture
def sampler():
    return RoundSampler(COUNTS, round_size=6, seed=5)


def test_every_round_has_one_number_of_images_and_every_row_comes(sampler):
    order = list(sampler)
    rounds = [order[i : i + 6] for i in range(0, len(order), 6)]
    assert all(len({COUNTS[i] for i in batch}) == 1 and len(batch) == 6 for batch in rounds)
    drawn = Counter(order)
    assert set(drawn) == set(range(34))
    assert sum(drawn.values()) == len(sampler) == 24 + 12 + 6
    assert sum(drawn.values()) - 34 == sampler.repeats == 1 + 4 + 3


def test_two_devices_see_one_number_of_images_in_a_round(sampler):
    batches = list(BatchSampler(sampler, 3, drop_last=False))
    for own, other in zip(batches[::2], batches[1::2], strict=True):  # as Accelerate deals them
        assert len({COUNTS[i] for i in [*own, *other]}) == 1


def test_kinds_are_mixed_over_the_epoch_and_differ_between_epochs_and_seeds(sampler):
    first = list(sampler)
    assert list(sampler) == first
    kinds = [COUNTS[i] for i in first]
    assert kinds != sorted(kinds)
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(RoundSampler(COUNTS, round_size=6, seed=6)) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
