"""Splits rows by group into train, validation and test, so that no group (patient) is in two.

Pure functions over names, hashes and thumbnails. The result does not depend on the order of the
rows.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from medft.config.strict_yaml import Section
from medft.errors import DataError

NEAR_BITS = 4
"""Bits, at most, of 64 in which the perceptual hashes of two candidate copies differ."""

NEAR_GRAY = 2.0
"""Largest mean difference of 32 x 32 thumbnails, in gray levels of 256, at which candidates are the
same image. On 150 real radiographs, copies of 0.5 or 0.77 of the side, saved as JPEG of quality 50,
differ by 0.6 on average and 1.4 at most (and by at most 4 bits of the hash); the rest is a margin
for brighter prints of the same scan."""


BLANK_GRAY = 2.0
"""Largest standard deviation of a thumbnail, in gray levels, at which an image counts as blank."""

_TRIED = 1000


SOURCE = "source"
"""What a split may name in place of a column: the name of the source."""


class SplitSection(Section):
    """Fractions of the rows held out for validation and test."""

    validation: float = Field(0.05, ge=0, lt=1)
    """Fraction of the accepted rows."""

    test: float = Field(0.05, ge=0, lt=1)
    """Fraction of the accepted rows."""

    keep: str | None = None
    """An earlier pairs.parquet, relative to SOURCES.yaml, whose groups keep their split."""

    seed: int = 17

    @model_validator(mode="after")
    def _leaves_something_to_train(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together below 1")
        return self


class OwnSplitSection(Section):
    """A split given by a column of the tables."""

    column: str
    """Column with the split, in the table of every source; `source`: the source's name."""

    train: list[str] = Field(min_length=1)
    """Values of the column that mean train."""

    validation: list[str] = Field([])
    """Values of the column that mean validation."""

    test: list[str] = Field([])
    """Values of the column that mean test."""

    shared_groups: Literal["refuse", "report"] = "refuse"
    """Whether a group that stands in several splits is an error, or counted and let through."""

    def split_of(self, value: str) -> str | None:
        """The split that a value of the column means; None for one that is not listed."""
        for name in ("train", "validation", "test"):
            if value in getattr(self, name):
                return name
        return None


class _Union:
    """Union-find over names; the root of a set is its smallest name."""

    def __init__(self) -> None:
        self.parent: dict[str, str] = {}

    def root(self, name: str) -> str:
        self.parent.setdefault(name, name)
        while self.parent[name] != name:
            self.parent[name] = self.parent[self.parent[name]]
            name = self.parent[name]
        return name

    def join(self, one: str, other: str) -> None:
        first, second = sorted((self.root(one), self.root(other)))
        self.parent[second] = first


def join_groups(
    groups: Sequence[str],
    hashes: Sequence[Sequence[str]],
    phashes: Sequence[Sequence[str]],
    thumbnails: np.ndarray,
    same: Sequence[tuple[str, str]] = (),
) -> tuple[list[str], dict[str, int]]:
    """The final group of each row: its own, joined with those that have one of its images.

    Images are the same if their bytes are equal, or if their perceptual hashes are near and their
    thumbnails agree closely. Other near hashes are counted and not joined: on X-rays of one view
    most belong to different patients.

    Args:
        groups: of each row, then of rejected rows, which join the groups of rows with their images.
        hashes: of each row's images.
        phashes: of each row's images, in hexadecimal; not of rejected rows.
        thumbnails: [images, 1024] gray values, in the order of the rows.
        same: pairs of groups that are one.

    Returns:
        A name for each of `groups`, and the numbers of joins made and not made.
    """
    union = _Union()
    for one, other in same:
        union.join(f"group/{one}", f"group/{other}")
    own = groups[: len(phashes)]
    given = len({union.root(f"group/{group}") for group in own})
    images: dict[str, int] = {}  # index of the first occurrence of each image, by SHA-256
    owners: list[str] = []
    for group, row in zip(own, hashes, strict=False):
        for digest in row:
            union.join(f"group/{group}", f"sha256/{digest}")
            images.setdefault(digest, len(owners))
            owners.append(f"group/{group}")
    for group, row in zip(groups[len(own) :], hashes[len(own) :], strict=True):
        for digest in filter(images.__contains__, row):
            union.join(f"group/{group}", f"sha256/{digest}")
    after_bytes = len({union.root(f"group/{group}") for group in own})
    places = np.array(sorted(images.values()), dtype=np.int64)
    flat = [int(value, 16) for row in phashes for value in row]
    near, agree = near_copies(np.array(flat, dtype=np.uint64)[places], thumbnails[places])
    for one, other in near[agree]:
        union.join(owners[places[one]], owners[places[other]])
    final = [union.root(f"group/{group}").removeprefix("group/") for group in groups]
    left = sum(
        union.root(owners[places[one]]) != union.root(owners[places[other]])
        for one, other in near[~agree]
    )
    report = {
        "groups_given": given,
        "joined_by_equal_images": given - after_bytes,
        "joined_by_near_copies": after_bytes - len(set(final[: len(own)])),
        "near_hashes_left_apart": left,
    }
    return final, report


def near_copies(hashes: np.ndarray, thumbnails: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of images whose hashes are near, and whether their thumbnails agree closely.

    Two hashes of 64 bits that differ in at most 4 agree in at least one of five bands of bits, so
    only images that agree in a band are compared. Blank images are left out: their hash is noise.

    Args:
        hashes: [N] uint64.
        thumbnails: [N, 1024] gray values.

    Returns:
        [P, 2] indices, the smaller one first, and [P] booleans.
    """
    spread = [thumbnails[i : i + 4096].std(axis=1) for i in range(0, len(thumbnails), 4096)]
    shown = np.flatnonzero(np.concatenate([[], *spread]) > BLANK_GRAY)
    found = [np.zeros((0, 2), np.int64)]
    for first in range(0, 64, 13):
        width = min(13, 64 - first)
        band = (hashes[shown] >> np.uint64(first)) & np.uint64((1 << width) - 1)
        order = np.argsort(band, kind="stable")
        edges = np.flatnonzero(np.diff(band[order])) + 1
        for members in (part for part in np.split(shown[order], edges) if len(part) > 1):
            for start in range(0, len(members), 1024):
                block = members[start : start + 1024]
                distance = np.bitwise_count(hashes[block][:, None] ^ hashes[members][None])
                one, other = np.nonzero(distance <= NEAR_BITS)
                pairs = np.stack([block[one], members[other]], axis=1)
                found.append(pairs[pairs[:, 0] < pairs[:, 1]])
    near = np.unique(np.concatenate(found), axis=0)
    agree = np.zeros(len(near), dtype=bool)
    for start in range(0, len(near), 4096):
        one, other = near[start : start + 4096].T
        difference = np.abs(thumbnails[one].astype(np.int16) - thumbnails[other])
        agree[start : start + 4096] = difference.mean(axis=1) <= NEAR_GRAY
    return near, agree


def assign_splits(
    groups: Sequence[str], split: SplitSection, kept: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """The split of each row; groups are not divided.

    Test and then validation are filled with groups in a random order drawn from the seed, up to
    floor(fraction * rows + 0.5) rows, or close below where the groups do not fit.

    Args:
        groups: of each row.
        split: the section of SOURCES.yaml.
        kept: splits of groups that are not drawn; their rows count.
    """
    sizes = Counter(groups)
    order = sorted(sizes, key=lambda group: _draw(split.seed, group))
    chosen = {group: kept[group] for group in order if group in kept}
    for name, share in (("test", split.test), ("validation", split.validation)):
        free = [group for group in order if group not in chosen]
        room = math.floor(share * len(groups) + 0.5)
        room -= sum(sizes[group] for group, place in chosen.items() if place == name)
        chosen |= dict.fromkeys(_filling(free, sizes, max(room, 0)), name)
    return [chosen.get(group, "train") for group in groups]


def _filling(order: Sequence[str], sizes: Counter[str], room: int) -> list[str]:
    """Groups of at most `room` rows in total: taken in order, the last part by subset sum."""
    chosen, rest = [], []
    exact_part = 4 * max((size for size in sizes.values() if size <= room), default=0)
    for group in order:
        if sizes[group] <= room - exact_part:
            chosen.append(group)
            room -= sizes[group]
        elif sizes[group] <= room:
            rest.append(group)
    rest = rest[:_TRIED]
    # bit n of sums[k]: a subset of the first k groups has n rows in total
    sums = [1]
    for group in rest:
        sums.append((sums[-1] | sums[-1] << sizes[group]) & ((1 << room + 1) - 1))
    rows = sums[-1].bit_length() - 1
    for k in range(len(rest), 0, -1):
        if not sums[k - 1] >> rows & 1:
            chosen.append(rest[k - 1])
            rows -= sizes[rest[k - 1]]
    return chosen


def divided_groups(groups: Sequence[str], splits: Sequence[str]) -> dict[str, list[str]]:
    """The groups that stand in several splits, with these, as a split of a table may have them."""
    found: dict[str, set[str]] = {}
    for group, split in zip(groups, splits, strict=True):
        found.setdefault(group, set()).add(split)
    return {group: sorted(places) for group, places in found.items() if len(places) > 1}


def refuse_divided(divided: Mapping[str, Sequence[str]], total: int) -> None:
    """Raise if a group stands in several splits.

    Args:
        divided: from `divided_groups`.
        total: number of all groups.

    Raises:
        DataError: one does.
    """
    if divided:
        first = min(divided)
        raise DataError(
            f"expected every group in one split, {len(divided)} of {total} stand in several, "
            f"first {first} ({', '.join(divided[first])}): correct the table's split, let medft "
            f"split by shares, or write shared_groups: report beside its column"
        )


def _draw(seed: int, group: str) -> str:
    return hashlib.sha256(f"{seed}/{group}".encode()).hexdigest()
