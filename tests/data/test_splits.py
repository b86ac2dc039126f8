"""No group stands in two splits, whatever the order of the rows."""

import io
import math
import random
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from medft.data.splits import (
    NEAR_BITS,
    NEAR_GRAY,
    SplitSection,
    assign_splits,
    divided_groups,
    join_groups,
    near_copies,
    refuse_divided,
)
from medft.data.stored_image import perceptual_hash, store_encoded_image
from medft.errors import DataError


def images(count, seed=0):
    """Smooth random thumbnails [count, 1024] and their hashes."""
    noise = np.random.default_rng(seed).normal(size=(count, 4, 4))
    images = [Image.fromarray(part).resize((32, 32), Image.Resampling.BICUBIC) for part in noise]
    gray = [np.asarray(image) * 40 + 128 for image in images]
    thumbnails = np.clip(gray, 0, 255).astype(np.uint8).reshape(count, 1024)
    return thumbnails, [perceptual_hash(Image.fromarray(t.reshape(32, 32))) for t in thumbnails]


def join(rows, thumbnails=None, hashes=None):
    """Final groups of (group, digests) rows; images differ unless given otherwise."""
    count = sum(len(digests) for _, digests in rows)
    if thumbnails is None:
        drawn = {digest: i for i, digest in enumerate({d for _, ds in rows for d in sorted(ds)})}
        every, names = images(len(drawn), seed=7)
        order = [drawn[digest] for _, digests in rows for digest in digests]
        thumbnails, hashes = every[order], [names[i] for i in order]
    assert len(thumbnails) == count
    remaining = iter(hashes)
    phashes = [[next(remaining) for _ in digests] for _, digests in rows]
    return join_groups([g for g, _ in rows], [d for _, d in rows], phashes, thumbnails)


def test_groups_that_share_a_image_become_one():
    rows = [("a", ["1"]), ("b", ["2"]), ("c", ["2", "3"]), ("d", ["3"]), ("e", ["4"])]
    groups, report = join(rows)
    assert groups == ["a", "b", "b", "b", "e"]
    assert report["joined_by_equal_images"] == 2
    assert join([("a", ["1"]), ("b", ["2"])])[0] == ["a", "b"]


def test_near_copies_join_and_other_near_hashes_are_counted():
    thumbnails, hashes = images(4)
    copy = np.clip(thumbnails[1].astype(int) + 1, 0, 255).astype(np.uint8)
    unlike = thumbnails[2][::-1].copy()
    blank = np.full(1024, 90, np.uint8)
    rows = [(name, [name]) for name in "abcdefgh"]
    flipped = f"{int(hashes[1], 16) ^ 0b1011:016x}"
    groups, report = join(
        rows,
        np.stack([*thumbnails, copy, unlike, blank, blank]),
        [*hashes, flipped, hashes[2], hashes[3], hashes[3]],
    )
    assert groups == ["a", "b", "c", "d", "b", "f", "g", "h"]
    assert report["joined_by_near_copies"] == 1
    assert report["near_hashes_left_apart"] == 1


def test_a_image_saved_again_or_shrunk_stays_below_the_limits():
    """Sharp edges and sides that no power of two divides, as scans have them."""
    random = np.random.default_rng(8)
    for _ in range(20):
        coarse = Image.fromarray(random.normal(128, 50, (7, 7)).clip(0, 255).astype(np.uint8))
        original = coarse.resize((753, 530), Image.Resampling.BICUBIC)
        pixels = np.asarray(original, dtype=float) + random.normal(0, 8, (530, 753))
        for left, top, gray in random.integers(0, 250, (12, 3)):
            pixels[2 * top : 2 * top + 90, 3 * left : 3 * left + 40] = gray
        original = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB")
        half = original.resize((376, 265), Image.Resampling.LANCZOS)
        less = original.resize((581, 409), Image.Resampling.LANCZOS)
        copies = [encoded(original), encoded(half), encoded(half, "PNG"), encoded(less)]
        one, *others = (
            store_encoded_image(content, name=None, max_pixels=10**6)
            for content in (encoded(original, "PNG"), *copies)
        )
        for other in others:
            grays = (np.frombuffer(i.thumbnail, np.uint8).astype(int) for i in (one, other))
            assert np.abs(next(grays) - next(grays)).mean() < NEAR_GRAY
            assert (int(one.phash, 16) ^ int(other.phash, 16)).bit_count() <= NEAR_BITS


def encoded(image: Image.Image, format: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=format, quality=50)
    return stream.getvalue()


def test_candidates_are_those_of_comparing_every_pair():
    random = np.random.default_rng(3)
    hashes = random.integers(0, 2**63, 400, dtype=np.uint64)
    for i in range(0, 200, 2):  # pairs at 0 to 6 bits
        flips = random.choice(64, i // 2 % 7, replace=False)
        hashes[i] = hashes[i + 1] ^ np.bitwise_or.reduce(
            np.array([1 << int(b) for b in flips], dtype=np.uint64), initial=np.uint64(0)
        )
    thumbnails = random.integers(0, 255, (400, 1024), dtype=np.uint8)
    near, _ = near_copies(hashes, thumbnails)
    expected = [
        (i, j)
        for i in range(400)
        for j in range(i + 1, 400)
        if int(hashes[i] ^ hashes[j]).bit_count() <= 4
    ]
    assert 60 < len(expected) < 90
    assert [tuple(pair) for pair in near.tolist()] == expected


def test_the_search_among_50_000_images_stays_small():
    random = np.random.default_rng(1)
    hashes = random.integers(0, 2**63, 50_000, dtype=np.uint64)
    thumbnails = random.integers(0, 255, (50_000, 1024), dtype=np.uint8)
    tracemalloc.start()
    near, agree = near_copies(hashes, thumbnails)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(near) == len(agree)
    assert peak < 200e6  # all 1.25 billion distances would take 1.25 GB


def test_shares_are_filled_with_whole_groups():
    groups = [f"g{index % 60}" for index in range(200)]
    splits = assign_splits(groups, SplitSection(validation=0.1, test=0.05, seed=3))
    assert splits.count("validation") == 20
    assert splits.count("test") == 10
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
    names = {row[0]: name for row, name in zip(rows, join(rows)[0], strict=True)}
    turned = list(reversed(rows))
    assert {row[0]: name for row, name in zip(turned, join(turned)[0], strict=True)} == names


def test_shares_are_met_exactly_where_sums_of_groups_allow():
    random = np.random.default_rng(5)
    for total in range(30):
        sizes = random.integers(2, 9, 60)
        groups = [f"{total}/{i}" for i, size in enumerate(sizes) for _ in range(size)]
        splits = assign_splits(groups, SplitSection(validation=0.1))
        assert splits.count("validation") == math.floor(0.1 * len(groups) + 0.5)


def test_a_group_in_several_splits_is_found():
    refuse_divided(divided_groups(["a", "b", "a"], ["train", "test", "train"]), 2)
    divided = divided_groups(["a", "b", "a"], ["train", "test", "test"])
    assert divided == {"a": ["test", "train"]}
    with pytest.raises(DataError, match="1 of 2 stand in several, first a"):
        refuse_divided(divided, 2)


def test_the_default_shares_are_a_twentieth_each():
    splits = assign_splits([f"g{i}" for i in range(200)], SplitSection())
    assert Counter(splits) == {"train": 180, "validation": 10, "test": 10}
