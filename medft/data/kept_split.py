"""A split that stays: the groups of an earlier pairs.parquet keep their side.

Old groups are known by their names, by the names that were joined with them then, and by the hashes
of their images.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medft.data.pairs import group_facts, open_pairs
from medft.errors import DataError

SHOWN_GROUPS = 3
"""Old groups that the error names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlierSplit:
    """The split of an earlier pairs.parquet."""

    path: Path
    of_group: dict[str, tuple[str, str]]
    """Group and split by its name, and by the names that were joined with it."""

    of_image: dict[str, tuple[str, str]]
    """Group and split by the SHA-256 of an image."""


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
    rows = open_pairs(path).read(columns=["group_id", "split", "sha256"]).to_pydict()
    of_group: dict[str, tuple[str, str]] = {}
    of_image: dict[str, tuple[str, str]] = {}
    for group, split, hashes in zip(rows["group_id"], rows["split"], rows["sha256"], strict=True):
        if of_group.setdefault(group, (group, split)) != (group, split):
            raise DataError(
                f"expected every group of {path} in one split, {'one' if hides else group} stands "
                f"in several: it cannot be kept, remove split.keep"
            )
        of_image.update(dict.fromkeys(hashes, (group, split)))
    for name, root in facts.joined.items():
        of_group[name] = of_group[root]
    return EarlierSplit(path=path, of_group=of_group, of_image=of_image)


def kept_sides(
    earlier: EarlierSplit,
    names: Sequence[str],
    hashes: Sequence[Sequence[str]],
    groups: Sequence[str],
    *,
    hides: bool,
) -> tuple[dict[str, str], int]:
    """The splits of the groups that were there earlier, and the number of earlier ones not found.

    Args:
        earlier: from `read_earlier_split`.
        names: of each row's group before groups were joined, hashed as in the earlier file.
        hashes: SHA-256 of each row's images.
        groups: of each row, joined.
        hides: whether the error shows the splits alone.

    Raises:
        DataError: a group joins earlier ones of two splits, or none is known.
    """
    found: dict[str, dict[str, str]] = defaultdict(dict)  # split by earlier group, by group
    for name, row, group in zip(names, hashes, groups, strict=True):
        if name in earlier.of_group:
            found[group].update([earlier.of_group[name]])
        found[group].update(earlier.of_image[d] for d in row if d in earlier.of_image)
    for known in found.values():
        if len(set(known.values())) > 1:
            shown = ", ".join(
                f"{'one' if hides else name} ({split})"
                for name, split in sorted(known.items())[:SHOWN_GROUPS]
            )
            raise DataError(
                f"expected groups that keep the split of {earlier.path}, these are one group now: "
                f"{shown}, joined by an image or a name: correct the rows, or remove split.keep"
            )
    sides = {group: next(iter(known.values())) for group, known in found.items() if known}
    if not sides:
        raise DataError(
            f"expected groups of {earlier.path} among the rows, none is: give the file of an "
            f"earlier export of the same patients"
        )
    seen = {group for known in found.values() for group in known}
    return sides, len({group for group, _ in earlier.of_group.values()} - seen)
