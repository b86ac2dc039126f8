"""The patient of each row: group values of all sources are compared, in one namespace by default.

Values are compared as they are written, without spaces around them. Values that are equal in their
loose form alone, such as 00123 and 123.0, are an error until `group_form` says what they mean.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medft.data.source_section import SourceSection
from medft.data.table_row import ReadOptions
from medft.data.tables import Rejected, table_rows
from medft.data.template import text_of
from medft.errors import DataError

SHOWN_PAIRS = 2
"""Pairs of values that the error shows."""

GroupMap = Mapping[str, Sequence[str]]
"""The values of one list of pseudonyms -> those of another for the same patient."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedGroups:
    """The group of each row, before rows with equal images are joined."""

    names: list[str]
    """NAMESPACE/VALUE, or image/SHA-256 of the first image where there is no value."""

    same: list[tuple[str, str]]
    """Names that a group_map joins."""

    shared: dict[str, int]
    """Number of values that several sources have, by the names of these sources."""

    empty: list[int]
    """Rows without value, by source; 0 for a source without `group`."""

    not_in_map: list[int]
    """Different values that the source's group_map lacks, by source."""


def loose_form(value: str) -> str:
    """A value without leading zeros, '.0', case and separators."""
    folded = unicodedata.normalize("NFKC", value).casefold().strip()
    whole = re.sub(r"^(\d+)\.0+$", r"\1", folded)
    without_zeros = re.sub(r"\d+", lambda digits: digits[0].lstrip("0") or "0", whole)
    return "".join(filter(str.isalnum, without_zeros)) or folded


def read_group_map(
    path: Path, *, na_values: frozenset[str] = frozenset(), values: Container[str] = ()
) -> dict[str, list[str]]:
    """A table of two columns: a value, and what the same patient is called in the other list.

    Args:
        path: a CSV file with a header.
        na_values: texts of cells that count as empty.
        values: of the source, of which the header is none.

    Raises:
        DataError: it cannot be read, or has other columns, an empty cell or no header.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for row in table_rows("csv", path, ReadOptions(na_values=na_values)):
        if not isinstance(row, Rejected) and next(iter(row), None) in values:
            raise DataError(
                f"expected a header in {path}, its first line holds a value of group: write the "
                f"names of the two lists above it"
            )
        cells = [] if isinstance(row, Rejected) else [text_of(cell) for cell in row.values()]
        if len(cells) != 2 or not all(cells):
            raise DataError(
                f"expected two columns without empty cells, below a header, in {path}, got a row "
                f"of {len(list(filter(None, cells)))}: correct group_map"
            )
        if cells[1] not in found[cells[0]]:
            found[cells[0]].append(cells[1])
    if not found:
        raise DataError(f"expected rows in {path}, found none: correct group_map")
    return dict(found)


def check_group_forms(
    sources: Sequence[SourceSection],
    values: Sequence[Iterable[str]],
    maps: Sequence[GroupMap | None],
    *,
    hides: bool,
) -> None:
    """Raise if values meet in their loose form alone and no `group_form` says what that means.

    Args:
        sources: all of SOURCES.yaml.
        values: of each source's `group` column, "" where there is none.
        maps: of each source.
        hides: whether the error shows the form of values alone, ### for 123.

    Raises:
        DataError: there are such values.
    """
    lists: dict[str, list[tuple[str, str]]] = defaultdict(list)  # (value, source) by list
    for source, own, known in zip(sources, values, maps, strict=True):
        different = set(filter(None, own))
        if known is not None:
            first = [(value, source.name) for value in sorted(different | known.keys())]
            lists[f"{source.name} before its group_map"] += first
            targets = {target for found in known.values() for target in found}
            different = (different - known.keys()) | targets
        lists[_namespace(source)] += [(value, source.name) for value in sorted(different)]
    decided = {_namespace(source) for source in sources if source.group_form}
    decided |= {f"{s.name} before its group_map" for s in sources if _namespace(s) in decided}
    for name, entries in lists.items():
        if name not in decided:
            _check_list(entries, hides=hides)


def _check_list(entries: Iterable[tuple[str, str]], *, hides: bool) -> None:
    ways: dict[str, dict[str, str]] = defaultdict(dict)  # source by value, by loose form
    for value, source in entries:
        ways[loose_form(value)].setdefault(value, source)
    several = [list(found.items()) for found in ways.values() if len(found) > 1]
    if several:
        shown = "; ".join(
            " and ".join(
                f"{_form_of(value) if hides else value!r} ({source})" for value, source in found[:2]
            )
            for found in several[:SHOWN_PAIRS]
        )
        raise DataError(
            f"expected every group to be written in one way, {len(several)} differ in leading "
            f"zeros, '.0', case or separators alone, such as {shown}: write group_form: loose in "
            f"these sources if such values mean one patient, as_written if they do not"
        )


def _form_of(value: str) -> str:
    """A value with its digits but leading zeros as #, and its letters as a or A."""
    digits = re.sub(r"(?<![0-9])(0*)([0-9]+)", lambda m: m[1] + "#" * len(m[2]), value)
    return re.sub(r"[^\W\d_]", lambda m: "A" if m[0].isupper() else "a", digits)


def name_groups(
    sources: Sequence[SourceSection],
    owners: Sequence[int],
    values: Sequence[str],
    images: Sequence[str],
    maps: Sequence[GroupMap | None],
) -> NamedGroups:
    """Name the group of each row.

    Args:
        sources: all of SOURCES.yaml.
        owners: index of each row's source.
        values: of the rows' `group` cells, "" where there is none.
        images: SHA-256 of each row's first image.
        maps: of each source.
    """
    namers = [_Namer(*pair) for pair in zip(sources, _is_loose(sources), maps, strict=True)]
    names: list[str] = []
    used_by: dict[str, set[int]] = defaultdict(set)
    empty = [0] * len(sources)
    for owner, value, image in zip(owners, values, images, strict=True):
        if not value:
            names.append(f"image/{image}")
            empty[owner] += sources[owner].group is not None
            continue
        names.append(namers[owner].name(value))
        used_by[names[-1]].add(owner)
    shared: dict[str, int] = defaultdict(int)
    for users in used_by.values():
        if len(users) > 1:
            shared[", ".join(sources[index].name for index in sorted(users))] += 1
    return NamedGroups(
        names=names,
        same=[pair for namer in namers for pair in namer.same],
        shared=dict(shared),
        empty=empty,
        not_in_map=[len(namer.not_in_map) for namer in namers],
    )


class _Namer:
    """Names the groups of one source."""

    def __init__(self, source: SourceSection, is_loose: bool, known: GroupMap | None) -> None:
        self._namespace = _namespace(source)
        self._form = loose_form if is_loose else str
        self._known = None
        self.same: list[tuple[str, str]] = []
        self.not_in_map: set[str] = set()
        if known is not None:
            merged: dict[str, list[str]] = defaultdict(list)
            for value, targets in known.items():
                merged[self._form(value)] += targets
            self._known = merged
            for first, *others in merged.values():
                self.same += [(self._in_namespace(first), self._in_namespace(o)) for o in others]

    def name(self, value: str) -> str:
        """The group of a value."""
        if self._known is not None:
            targets = self._known.get(self._form(value))
            if targets:
                return self._in_namespace(targets[0])
            self.not_in_map.add(value)
        return self._in_namespace(value)

    def _in_namespace(self, value: str) -> str:
        return f"{self._namespace}/{self._form(value)}"


def _is_loose(sources: Sequence[SourceSection]) -> list[bool]:
    """Whether values of each source are compared in the loose form: its namespace decides."""
    loose = {_namespace(source) for source in sources if source.group_form == "loose"}
    return [_namespace(source) in loose for source in sources]


def _namespace(source: SourceSection) -> str:
    return source.group_namespace or "group"
