"""Rows with no, one and two images: equal numbers in a round, and every row in an epoch."""

from collections import Counter

import pytest
from torch.utils.data import BatchSampler

from medft.decoder.sampler import GlobalBatchSampler
from medft.training.trainer import ROW_IDS

COUNTS = [1] * 23 + [2] * 8 + [0] * 3


@pytest.fixture
def sampler():
    return GlobalBatchSampler(COUNTS, global_batch_size=6, seed=5, fills=True)


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
    assert list(GlobalBatchSampler(COUNTS, global_batch_size=6, seed=6, fills=True)) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_rows_of_one_kind_come_in_the_same_order_whatever_the_round(sampler):
    whole, filled = (
        GlobalBatchSampler([1] * 20, global_batch_size=size, seed=5, fills=size == 6)
        for size in (1, 6)
    )
    assert sorted(whole) == list(range(20)) != list(whole)
    assert (len(whole), whole.repeats, len(filled), filled.repeats) == (20, 0, 24, 4)
    assert list(filled)[:20] == list(whole)
    assert list(filled)[20:] == list(whole)[:4]


def test_grouping_by_length_shortens_what_is_padded_and_loses_nothing():
    lengths = [7 * index % 100 for index in range(100)]
    options = {"global_batch_size": 4, "seed": 5, "fills": True}
    drawn, grouped = (
        GlobalBatchSampler([1] * 100, **options, lengths=given) for given in (None, lengths)
    )

    def padding(order):
        rounds = [order[i : i + 4] for i in range(0, len(order), 4)]
        return sum(max(lengths[j] for j in r) * 4 - sum(lengths[j] for j in r) for r in rounds)

    assert sorted(grouped) == list(range(100))
    assert padding(list(grouped)) < padding(list(drawn)) / 5
    first = [lengths[i] for i in list(grouped)[::4]]
    assert first not in (sorted(first), sorted(first, reverse=True))
    assert list(grouped) == list(grouped)


def test_the_order_of_rows_is_that_of_data_seed(sections, write_recipe, build_trainer):
    def order(*words):
        loader = build_trainer(write_recipe(sections("decoder")), words).get_train_dataloader()
        return [name for batch in loader for name in batch[ROW_IDS]]

    expected = order("train.data_seed=5")
    assert order("train.data_seed=5", "train.seed=99") == expected
    assert order("train.seed=5") == expected
    assert order("train.data_seed=6") != expected
    assert order("train.data_seed=0", "train.seed=5") != expected
