"""Rows with no, one and two images: equal numbers in a global batch, and every row in an epoch."""

from collections import Counter
from itertools import chain

import pytest

from medft.decoder.sampler import GlobalBatchSampler

COUNTS = [1] * 23 + [2] * 8 + [0] * 3


@pytest.fixture
def sampler():
    return GlobalBatchSampler(COUNTS, batch_size=3, num_processes=2, seed=5)


def order_of(sampler):
    return list(chain(*sampler))


def test_every_global_batch_has_one_number_of_images_and_every_row_comes(sampler):
    batches = list(sampler)
    assert len(batches) == len(sampler) == (24 + 12 + 6) // 3
    assert {len(batch) for batch in batches} == {3}
    for own, other in zip(batches[::2], batches[1::2], strict=True):  # as Accelerate deals them
        assert len({COUNTS[i] for i in [*own, *other]}) == 1
    drawn = Counter(order_of(sampler))
    assert set(drawn) == set(range(34))
    assert sum(drawn.values()) - 34 == sampler.repeats == 1 + 4 + 3
    assert max(drawn.values()) == sampler.most_repeated == 2


def test_a_rare_modality_is_repeated_for_several_processes_only():
    modalities = [1] * 100 + [0]
    one = GlobalBatchSampler(modalities, batch_size=16, num_processes=1, seed=5)
    two = GlobalBatchSampler(modalities, batch_size=8, num_processes=2, seed=5)
    assert Counter(order_of(one)) == Counter(range(101))
    assert (one.repeats, one.most_repeated, len(one)) == (0, 1, 8)
    batches = list(one)
    assert sorted(map(len, batches)) == [1, 4, 16, 16, 16, 16, 16, 16]
    assert all(len({modalities[i] for i in batch}) == 1 for batch in batches)
    assert Counter(order_of(two))[100] == 16
    assert (two.repeats, two.most_repeated, len(two)) == (12 + 15, 16, 16)


def test_a_short_batch_may_come_before_the_epochs_end():
    short = []
    for seed in range(8):
        sampler = GlobalBatchSampler(COUNTS, batch_size=6, num_processes=1, seed=seed)
        short += [len(batch) for batch in list(sampler)[:-1] if len(batch) < 6]
        assert sorted(order_of(sampler)) == list(range(34))
        assert len(list(sampler)) == len(sampler) == 4 + 2 + 1
    assert set(short) == {5, 2, 3}


def test_kinds_are_mixed_over_the_epoch_and_differ_between_epochs_and_seeds(sampler):
    first = order_of(sampler)
    assert order_of(sampler) == first
    kinds = [COUNTS[i] for i in first]
    assert kinds != sorted(kinds)
    sampler.set_epoch(1)
    assert order_of(sampler) != first
    other = GlobalBatchSampler(COUNTS, batch_size=3, num_processes=2, seed=6)
    assert order_of(other) != first
    sampler.set_epoch(0)
    assert order_of(sampler) == first


def test_rows_of_one_kind_come_in_the_same_order_whatever_the_global_batch():
    whole, filled = (
        GlobalBatchSampler([1] * 20, batch_size=1, num_processes=size, seed=5) for size in (1, 6)
    )
    assert sorted(order_of(whole)) == list(range(20)) != order_of(whole)
    assert (len(whole), whole.repeats, len(filled), filled.repeats) == (20, 0, 24, 4)
    assert order_of(filled)[:20] == order_of(whole)
    assert order_of(filled)[20:] == order_of(whole)[:4]


@pytest.mark.parametrize("rows", [100, 97])
def test_grouping_by_length_shortens_what_is_padded_and_loses_nothing(rows):
    lengths = [7 * index % 100 for index in range(rows)]
    options = {"batch_size": 4, "num_processes": 1, "seed": 5}
    drawn, grouped = (
        GlobalBatchSampler([1] * rows, **options, lengths=given) for given in (None, lengths)
    )

    def padding(sampler):
        return sum(
            max(lengths[j] for j in batch) * len(batch) - sum(lengths[j] for j in batch)
            for batch in sampler
        )

    assert sorted(order_of(grouped)) == list(range(rows))
    assert padding(grouped) < padding(drawn) / 5
    first = [lengths[batch[0]] for batch in grouped]
    assert first not in (sorted(first), sorted(first, reverse=True))
    assert list(grouped) == list(grouped)


def test_one_process_trains_what_two_do_where_nothing_is_filled():
    modalities = [1] * 12 + [0] * 6
    one = GlobalBatchSampler(modalities, batch_size=6, num_processes=1, seed=5)
    two = GlobalBatchSampler(modalities, batch_size=3, num_processes=2, seed=5)
    halves = list(two)
    joined = [own + other for own, other in zip(halves[::2], halves[1::2], strict=True)]
    assert joined == list(one)
