"""No group stands in two splits, whatever the order of the rows."""

import random

from medft.data.splits import SplitSection, assign_splits, join_groups


def test_groups_that_share_a_picture_become_one():
    rows = [("a", ["1"]), ("b", ["2"]), ("c", ["2", "3"]), ("d", ["3"]), ("e", ["4"])]
    groups = join_groups(rows)
    assert groups == ["a", "b", "b", "b", "e"]
    assert join_groups([("a", ["1"]), ("b", ["2"])]) == ["a", "b"]


def test_shares_are_filled_with_whole_groups():
    groups = [f"g{index % 60}" for index in range(200)]
    splits = assign_splits(groups, SplitSection(validation=0.1, test=0.05, seed=3))
    # groups have 3 or 4 rows, so that up to 2 rows of a share stay open
    assert 18 <= splits.count("validation") <= 20
    assert 8 <= splits.count("test") <= 10
    for group in set(groups):
        assert len({split for g, split in zip(groups, splits, strict=True) if g == group}) == 1


def test_the_order_of_rows_does_not_matter_and_the_seed_does():
    groups = [f"g{index % 37}" for index in range(150)]
    split = SplitSection(validation=0.2)
    by_group = dict(zip(groups, assign_splits(groups, split), strict=True))
    shuffled = random.Random(1).sample(groups, len(groups))
    assert dict(zip(shuffled, assign_splits(shuffled, split), strict=True)) == by_group
    other = SplitSection(validation=0.2, seed=18)
    assert dict(zip(groups, assign_splits(groups, other), strict=True)) != by_group


def test_a_group_too_large_for_the_share_stays_in_training():
    assert assign_splits(["one"] * 50, SplitSection(validation=0.1)) == ["train"] * 50


def test_joining_does_not_depend_on_the_order():
    rows = [("a", ["1", "2"]), ("b", ["3"]), ("c", ["2", "3"]), ("d", ["9"])]
    names = {row[0]: name for row, name in zip(rows, join_groups(rows), strict=True)}
    turned = list(reversed(rows))
    assert {row[0]: name for row, name in zip(turned, join_groups(turned), strict=True)} == names
