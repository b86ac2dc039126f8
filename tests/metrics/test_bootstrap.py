"""Intervals over patients, against scipy where each row is a patient."""

import json
import time
from dataclasses import asdict

import numpy as np
import pytest
import scipy.stats

from medft.metrics.bootstrap import difference, estimate, mean, ratio


def names(count):
    return [f"p{index:04d}" for index in range(count)]


def width(found):
    return found.high - found.low


def test_the_interval_is_that_of_scipy_where_each_row_is_a_group():
    values = np.random.default_rng(0).gamma(2.0, size=200)  # skewed, so that the ends differ
    found = estimate(mean(values, "no row"), names(200), resamples=4000)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.value == pytest.approx(values.mean())
    # the 2.5 % quantile of 4000 draws of a normal deviates by 0.04 of its standard error
    tolerance = 5 * 0.04 * values.std() / np.sqrt(200)
    assert found.low == pytest.approx(expected.low, abs=tolerance)
    assert found.high == pytest.approx(expected.high, abs=tolerance)
    assert tolerance < 0.06 * (found.high - found.low)


def test_rows_of_one_patient_are_drawn_together():
    values = np.repeat(np.random.default_rng(2).normal(size=50), 8)
    scorer = mean(values, "no row")
    together = estimate(scorer, np.repeat(names(50), 8).tolist())
    apart = estimate(scorer, names(400))
    assert together.value == apart.value
    assert (together.groups, apart.groups) == (50, 400)
    # copies carry nothing new: the standard error is sqrt(8) = 2.8 times that of 400 rows
    assert 2.4 < width(together) / width(apart) < 3.3


def test_the_interval_covers_the_truth_in_about_95_of_100_studies():
    random = np.random.default_rng(3)
    covered = 0
    for study in range(200):
        patients = random.normal(size=40)
        values = np.repeat(patients, 5) + random.normal(size=200)
        found = estimate(
            mean(values, "no row"), np.repeat(names(40), 5).tolist(), resamples=200, seed=study
        )
        covered += found.low <= 0 <= found.high
    assert 178 <= covered <= 198  # 188 are expected of 40 patients; 3 standard deviations are 10


def test_the_order_of_rows_does_not_matter_and_the_seed_does():
    random = np.random.default_rng(4)
    values = random.normal(size=300)
    groups = [f"p{index}" for index in random.integers(0, 60, 300)]
    order = random.permutation(300)
    found = estimate(mean(values, "no row"), groups)
    turned = estimate(mean(values[order], "no row"), [groups[index] for index in order])
    assert [turned.value, turned.low, turned.high] == pytest.approx(
        [found.value, found.low, found.high], rel=1e-9
    )  # sums of 300 numbers in another order, some near 0
    assert estimate(mean(values, "no row"), groups) == found
    assert estimate(mean(values, "no row"), groups, seed=18).low != found.low


def test_the_difference_is_paired():
    random = np.random.default_rng(5)
    hard = random.normal(size=300)
    one = mean(hard + 0.1 * random.normal(size=300) + 0.2, "no row")
    other = mean(hard + 0.1 * random.normal(size=300), "no row")
    paired = estimate(difference(one, other), names(300))
    alone = [estimate(scorer, names(300), seed=seed) for seed, scorer in enumerate((one, other))]
    assert paired.value == pytest.approx(alone[0].value - alone[1].value)
    unpaired = np.hypot(width(alone[0]), width(alone[1]))
    assert width(paired) < 0.2 * unpaired  # 0.1 by the spreads above
    assert paired.low > 0
    assert alone[0].low < alone[1].high
    assert estimate(difference(one, one), names(300)).high == 0


def test_a_difference_needs_the_same_rows():
    every = mean(np.ones(4), "no row")
    some = np.array([True, False, True, True])
    with pytest.raises(ValueError, match="same rows"):
        difference(every, ratio(some, some, some, "no row"))
    with pytest.raises(ValueError, match="same rows"):
        difference(every, mean(np.ones(3), "no row"))


def test_what_is_not_defined_has_a_reason():
    empty = estimate(mean(np.zeros(0), "no row"), [])
    assert (empty.value, empty.low, empty.high, empty.reason) == (None, None, None, "no row")
    assert (empty.n, empty.groups) == (0, 0)
    nothing = ratio(np.zeros(3), np.zeros(3), np.ones(3), "nothing named")
    assert estimate(nothing, names(3)).value is None
    assert estimate(nothing, names(3)).reason == "nothing named"
    one = estimate(mean(np.array([1.0, 2.0]), "no row"), ["a", "a"])
    assert (one.value, one.low, one.high, one.reason) == (1.5, None, None, "one group")
    assert json.loads(json.dumps(asdict(one)))["groups"] == 1
    two = estimate(mean(np.array([1.0, 2.0]), "no row"), ["a", "b"])
    assert (two.low, two.high, two.reason) == (1.0, 2.0, None)


def test_groups_without_a_row_that_counts_are_not_drawn():
    counts = np.zeros(100)
    counts[:4] = 1
    right = counts * (np.arange(100) % 2)
    found = estimate(ratio(right, counts, counts, "none"), names(100))
    assert (found.value, found.n, found.groups) == (0.5, 4, 4)
    assert estimate(ratio(right[:4], counts[:4], counts[:4], "none"), names(4)) == found
    same_patient = ["a"] * 4 + names(96)
    assert estimate(ratio(right, counts, counts, "none"), same_patient).reason == "one group"


@pytest.mark.parametrize(("defined_rows", "has_interval"), [(2, False), (4, True)])
def test_resamples_without_a_value_are_left_out_if_they_are_few(defined_rows, has_interval):
    below = np.zeros(5)
    below[:defined_rows] = 1  # missed by a resample with chance 0.6**5 = 8 % and 0.2**5 = 0.03 %
    found = estimate(ratio(below, below, np.ones(5), "none"), names(5))
    assert found.value == 1
    if has_interval:
        assert (found.low, found.high, found.reason) == (1, 1, None)
    else:
        assert found.low is found.high is None
        assert "of 1000 resamples" in found.reason


def test_groups_and_rows_agree_in_number():
    with pytest.raises(ValueError, match="zip"):
        estimate(mean(np.ones(3), "no row"), ["a", "b"])


def test_5000_rows_take_a_second_at_most():
    values = np.random.default_rng(6).normal(size=5000)
    scorer, groups = mean(values, "no row"), names(5000)
    start = time.process_time()
    estimate(scorer, groups)
    assert time.process_time() - start < 1
