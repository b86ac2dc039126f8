"""A split that stays: the groups of an earlier pairs.parquet keep their side.

Old groups are known by their names, by the names that were joined with them then, and by the hashes
of their images.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medft.data.pairs import group_facts, read_pairs
from medft.errors import DataError

SHOWN_GROUPS = 3
"""Old groups that the error names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlierSplit:
    """The split of an earlier pairs.parquet."""

    path: Path
    splits: dict[str, str]
    """Split by group."""

    of_name: dict[str, str]
    """Group by its own name, and by the names that were joined with it."""

    of_image: dict[str, str]
    """Group by the SHA-256 of an image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """What of an earlier split is kept."""

    sides: dict[str, str]
    """Split by group of now."""

    not_found: int
    """Earlier groups that no row belongs to."""


def read_earlier_split(path: Path, *, key_id: str | None, hides: bool) -> EarlierSplit:
    """The split of an earlier pairs.parquet.

    Args:
        path: the file.
        key_id: what identifies the key that group ids are hashed with; None if they are clear.
        hides: whether the error shows no group.

    Raises:
        DataError: it is no pairs.parquet, its group ids have another form, or a group is in
            several splits.
    """
    facts = group_facts(path)
    if facts is None or facts.key_id != key_id:
        raise DataError(
            f"expected group ids in {path} that are made as those of now, "
            f"{'an older medft wrote it' if facts is None else 'group_key differs'}: prepare the "
            f"earlier export again, with the same group_key"
        )
    splits: dict[str, str] = {}
    of_image: dict[str, str] = {}
    for row in read_pairs(path, images=False):
        group, split, hashes = row["group_id"], row["split"], row["sha256"]
        if splits.setdefault(group, split) != split:
            raise DataError(
                f"expected every group of {path} in one split, {'one' if hides else group} stands "
                f"in several: it cannot be kept, remove split.keep"
            )
        of_image.update(dict.fromkeys(hashes, group))
    of_name = {**{group: group for group in splits}, **facts.joined}
    return EarlierSplit(path=path, splits=splits, of_name=of_name, of_image=of_image)


def kept_sides(
    earlier: EarlierSplit,
    names: Sequence[str],
    hashes: Sequence[Sequence[str]],
    groups: Sequence[str],
    *,
    hides: bool,
) -> Kept:
    """The splits of the groups that were there earlier.

    Args:
        earlier: from `read_earlier_split`.
        names: of each row's group before groups were joined, hashed as in the earlier file.
        hashes: SHA-256 of each row's images.
        groups: of each row, joined.
        hides: whether the error shows the splits alone.

    Raises:
        DataError: a group joins earlier ones of two splits, or none is known.
    """
    found: dict[str, set[str]] = defaultdict(set)  # earlier groups by group
    for name, row, group in zip(names, hashes, groups, strict=True):
        same = (earlier.of_name.get(name), *map(earlier.of_image.get, row))
        found[group].update(filter(None, same))
    for known in found.values():
        if len({earlier.splits[group] for group in known}) > 1:
            shown = ", ".join(
                f"{'one' if hides else group} ({earlier.splits[group]})"
                for group in sorted(known)[:SHOWN_GROUPS]
            )
            raise DataError(
                f"expected groups that keep the split of {earlier.path}, these are one group now: "
                f"{shown}, joined by an image or a name: correct the rows, or remove split.keep"
            )
    sides = {group: earlier.splits[min(known)] for group, known in found.items() if known}
    if not sides:
        raise DataError(
            f"expected groups of {earlier.path} among the rows, none is: give the file of an "
            f"earlier export of the same patients"
        )
    return Kept(sides=sides, not_found=len(earlier.splits.keys() - set().union(*found.values())))
