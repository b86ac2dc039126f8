"""The final group and split of every accepted pair, once all of them are known."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from medft.data.clearing import Clearer
from medft.data.group_key import group_key_of, keyed
from medft.data.groups import (
    GroupMap,
    NamedGroups,
    check_group_forms,
    name_groups,
    read_group_map,
)
from medft.data.kept_split import EarlierSplit, kept_sides, read_earlier_split
from medft.data.pairs import GroupFacts
from medft.data.source_section import SourceSection
from medft.data.sources import SourcesFile
from medft.data.splits import (
    OwnSplitSection,
    SplitSection,
    assign_splits,
    divided_groups,
    join_groups,
    refuse_divided,
)
from medft.data.tables import tables_rows, takes
from medft.data.template import text_of


@dataclass(slots=True)
class Collected:
    """What is kept in memory of all accepted pairs; no images."""

    sources: list[int] = field(default_factory=list)
    """Index of each pair's source."""

    groups: list[str] = field(default_factory=list)
    """Values of the sources' `group`."""

    hashes: list[list[str]] = field(default_factory=list)
    """SHA-256 of the images."""

    phashes: list[list[str]] = field(default_factory=list)
    """Perceptual hashes of the images."""

    splits: list[str] = field(default_factory=list)
    """Given by the tables; empty where medft splits."""

    rejected: list[tuple[int, str, list[str]]] = field(default_factory=list)
    """Source, value of `group` and images of rejected rows: they still tell that their patient is
    that of the pairs with the same image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """What is read before any image: the group maps, and the split to keep."""

    maps: Sequence[GroupMap | None]
    """Of each source."""

    earlier: EarlierSplit | None
    key: bytes | None
    """That group ids are hashed with."""

    @classmethod
    def read(cls, spec: SourcesFile, root: Path) -> "Known":
        """Read both, and compare how the tables write their groups.

        Args:
            spec: SOURCES.yaml.
            root: its folder.

        Raises:
            DataError: a file cannot be read, or groups are written in several ways.
            RecipeError: the key is missing or short, or a source writes its groups in the clear.
        """
        key = group_key_of(spec, root)
        values = [_table_groups(source, root) for source in spec.sources]
        maps = [
            _map_of(source, root, own) for source, own in zip(spec.sources, values, strict=True)
        ]
        hides = _hides(spec, key)
        check_group_forms(spec.sources, values, maps, hides=hides)
        keep = spec.split.keep if isinstance(spec.split, SplitSection) else None
        earlier = None
        if keep:
            hides = hides and key is None  # keyed groups tell nothing
            earlier = read_earlier_split(root / keep, key_id=_key_id(key), hides=hides)
        return cls(maps=maps, earlier=earlier, key=key)


def _map_of(source: SourceSection, root: Path, values: set[str]) -> GroupMap | None:
    if source.group_map is None:
        return None
    na_values = source.read_options(root).na_values
    return read_group_map(root / source.group_map, na_values=na_values, values=values)


def _table_groups(source: SourceSection, root: Path) -> set[str]:
    """The values of a source's group, read before its images; none for DICOM's, which are tags."""
    if source.group is None or source.kind == "dicom":
        return set()
    columns = [source.group, *(source.where or {})]
    options = replace(source.read_options(root), names_image=None)  # the pass over the images looks
    rows = tables_rows(source.kind, source.tables(root), options, columns=columns)
    taken = (row for row in rows if isinstance(row, dict) and takes(row, source.where))
    return {text_of(row.get(source.group)) for row in taken}


@dataclass(frozen=True, kw_only=True, slots=True)
class Assigned:
    """Groups and splits, in the order of the pairs."""

    groups: list[str]
    splits: list[str]
    facts: GroupFacts
    """For pairs.parquet."""

    named: NamedGroups
    summary: dict[str, Any]
    """Counts for summary.json."""


def assign(
    spec: SourcesFile, collected: Collected, thumbnails: np.ndarray, known: Known
) -> Assigned:
    """Join the groups of pairs with the same images, and split them.

    Args:
        spec: SOURCES.yaml.
        collected: of all pairs.
        thumbnails: [images, 1024] gray values, in the order of the pairs.
        known: from `Known.read`.

    Raises:
        DataError: groups are written in several ways, stand in several splits, or cannot keep
            their split.
    """
    by_source: list[set[str]] = [set() for _ in spec.sources]
    owners = [*collected.sources, *(source for source, _, _ in collected.rejected)]
    values = [*collected.groups, *(value for _, value, _ in collected.rejected)]
    hashes = [*collected.hashes, *(images for _, _, images in collected.rejected)]
    for source, value in zip(owners, values, strict=True):
        by_source[source].add(value)
    hides = _hides(spec, known.key)
    check_group_forms(spec.sources, by_source, known.maps, hides=hides)
    named = name_groups(spec.sources, owners, values, [row[0] for row in hashes], known.maps)
    every, joins = join_groups(named.names, hashes, collected.phashes, thumbnails, named.same)
    groups = every[: len(collected.groups)]
    kept = None
    splits = collected.splits
    if isinstance(spec.split, SplitSection):
        if known.earlier:
            names = _written(named.names, known.key)
            clear = hides and known.key is None
            kept = kept_sides(known.earlier, names, hashes, every, hides=clear)
        splits = assign_splits(groups, spec.split, kept.sides if kept else {})
    divided = divided_groups(groups, splits)
    if not (isinstance(spec.split, OwnSplitSection) and spec.split.shared_groups == "report"):
        shown = keyed(divided, known.key or os.urandom(16)) if hides else divided
        refuse_divided(dict(zip(shown, divided.values(), strict=True)), len(set(groups)))
    final = set(groups)
    joined = {n: g for n, g in zip(named.names, every, strict=True) if n != g and g in final}
    return Assigned(
        groups=_written(groups, known.key),
        splits=splits,
        facts=GroupFacts(
            key_id=_key_id(known.key),
            joined=dict(
                zip(_written(joined, known.key), _written(joined.values(), known.key), strict=True)
            ),
        ),
        named=named,
        summary={
            "groups": len(set(groups)),
            "largest_group": max(Counter(groups).values(), default=0),
            "shared_group_values": sum(named.shared.values()),
            "shared_by_sources": named.shared,
            "joins": joins,
            "splits": dict(sorted(Counter(splits).items())),
            "shared_between_splits": _counted(divided, groups),
            "kept": kept and {**_counted(kept.sides, groups), "not_found": kept.not_found},
        },
    )


def _hides(spec: SourcesFile, key: bytes | None) -> bool:
    """Whether sentences may not quote groups."""
    return any(Clearer(source, key).withholds for source in spec.sources)


def _written(ids: Iterable[str], key: bytes | None) -> list[str]:
    """Group ids as they are written."""
    return keyed(ids, key) if key else list(ids)


def _key_id(key: bytes | None) -> str | None:
    """What identifies a key and tells nothing of it."""
    return keyed(["the key of group ids"], key)[0] if key else None


def _counted(chosen: Mapping[str, Any], groups: Sequence[str]) -> dict[str, int]:
    return {"groups": len(chosen), "pairs": sum(group in chosen for group in groups)}
