"""What may be written of sources with identifiers, and of all sources where groups are keyed.

Identifiers are found in the other cells of their own rows, which are rejected or masked. Details of
rejected rows that quote cells are withheld.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from medft.data.group_key import keyed
from medft.data.identifiers import MASK, Identifiers
from medft.data.source_section import SourceSection
from medft.data.tables import Rejected, TableRow
from medft.data.template import text_of

FILE_NAME = "file name"

_QUOTES_NO_CELL = {
    "different_groups",
    "different_licenses",
    "different_questions",
    "different_texts",
    "duplicate",
    "empty_group",
    "empty_question",
    "empty_text",
    "identifier",
    "image_placeholder",
    "not_text",
    "wrong_cell_count",
}
"""Reasons whose details hold names of columns and numbers only."""

_WITHHELD = "not shown, it may quote an identifier: look the row up in the source"


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What a pair writes apart from its images."""

    id: str
    """Empty if the source gives none."""

    texts: dict[str, str]
    """By place: text, question, license, field NAME."""

    names: list[str | None]
    """File names of the images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """What the search of one pair found."""

    found: dict[str, list[str]]
    """Places by identifier column."""

    not_searched: list[str]
    empty: list[str]
    keyed_ids: int
    dropped_names: int
    """File names that held the group and were dropped for that."""


@dataclass(slots=True)
class SearchCounts:
    """Numbers of a source's searched pairs, by identifier column."""

    pairs: int = 0
    found: Counter[str] = field(default_factory=Counter)
    where: dict[str, Counter[str]] = field(default_factory=dict)
    not_searched: Counter[str] = field(default_factory=Counter)
    empty: Counter[str] = field(default_factory=Counter)
    keyed_ids: int = 0
    dropped_names: int = 0

    def add(self, search: Search | None) -> None:
        """Count the search of a pair; None: it was not searched."""
        if search is None:
            return
        self.pairs += 1
        self.found.update(search.found.keys())
        for column, places in search.found.items():
            self.where.setdefault(column, Counter()).update(places)
        self.not_searched.update(search.not_searched)
        self.empty.update(search.empty)
        self.keyed_ids += search.keyed_ids
        self.dropped_names += search.dropped_names

    def summary(self, source: SourceSection, *, is_keyed: bool) -> dict[str, Any]:
        """The part of a source's entry in summary.json."""
        columns = {
            column: {
                "found": self.found[column],
                "where": dict(sorted(self.where.get(column, Counter()).items())),
                "not_searched": self.not_searched[column],
                "empty": self.empty[column],
            }
            for column in source.identifiers
        }
        entry: dict[str, Any] = {"identifiers": columns}
        if columns:
            entry |= {"on_identifier": source.on_identifier, "searched": self.pairs}
        if is_keyed:
            entry |= {"keyed_ids": self.keyed_ids, "dropped_file_names": self.dropped_names}
        return entry


class Clearer:
    """Clears what the pairs of a source write.

    Args:
        source: its section.
        key: of the groups; None: they stay in the clear.
    """

    def __init__(self, source: SourceSection, key: bytes | None) -> None:
        self.source = source
        self.key = key

    def cleared(self, written: Written, rows: list[TableRow]) -> tuple[Written, Search | None]:
        """What may be written, identifiers masked, and what was found.

        Where the source rejects identifiers and the search found one, the pair is to be rejected.

        Args:
            written: as the rows have it.
            rows: of the pair, whose identifiers are searched for.
        """
        if not self.withholds:
            return written, None
        columns = self.source.identifiers
        identifiers = Identifiers({name: [row.get(name) for row in rows] for name in columns})
        group = self.source.group
        groups = [text_of(row.get(group)).casefold() for row in rows] if group else []
        holds_group = [self.key and _holds(name, groups) for name in written.names]
        keyed_id = self._keyed_id(written.id, groups, identifiers)
        found = _found(written, identifiers, columns, has_id=not keyed_id)
        cleared = Written(
            id=keyed_id or ("" if any("id" in places for places in found.values()) else written.id),
            texts={
                place: MASK if text and _column(place) in columns else identifiers.masked(text)
                for place, text in written.texts.items()
            },
            names=[
                None if name is None or hidden or identifiers.columns_in(name) else name
                for name, hidden in zip(written.names, holds_group, strict=True)
            ],
        )
        search = Search(
            found=found,
            not_searched=identifiers.not_searched,
            empty=identifiers.empty,
            keyed_ids=bool(keyed_id),
            dropped_names=sum(map(bool, holds_group)),
        )
        return cleared, search

    def check(self, cleared: Written, search: Search) -> None:
        """Raise for a pair that is not to be written.

        Raises:
            Rejected: an identifier was found and not masked, or masks are all that is left.
        """
        if not search.found:
            return
        if self.source.on_identifier == "reject":
            places = [f"{column} in {', '.join(where)}" for column, where in search.found.items()]
            raise Rejected("identifier", "; ".join(places))
        for place in ("text", "question"):
            rest = cleared.texts[place].replace(MASK, "")
            if rest != cleared.texts[place] and not re.search(r"[^\W_]", rest):
                raise Rejected("identifier", f"nothing is left of {place} but masks")

    def _keyed_id(self, given: str, groups: list[str], identifiers: Identifiers) -> str:
        """The keyed hash of an id that holds a group or an identifier; empty for others."""
        if self.key and given and (_holds(given, groups) or identifiers.columns_in(given)):
            return keyed([given], self.key)[0]
        return ""

    @property
    def withholds(self) -> bool:
        """Whether no cell or file name of the source may be quoted."""
        return bool(self.source.identifiers) or self.key is not None

    def detail(self, reason: str, detail: str) -> str:
        """The detail of a rejected row as it may be written."""
        return _WITHHELD if self.withholds and reason not in _QUOTES_NO_CELL else detail


def _found(
    written: Written, identifiers: Identifiers, columns: list[str], *, has_id: bool
) -> dict[str, list[str]]:
    """The places of each column's values; a kept identifier column holds its own value."""
    places = [*written.texts.items(), *((FILE_NAME, name) for name in written.names if name)]
    places += [("id", written.id)] if has_id else []
    found: dict[str, dict[str, None]] = {}
    for place, text in places:
        own = [_column(place)] if text and _column(place) in columns else []
        for column in [*own, *identifiers.columns_in(text)]:
            found.setdefault(column, {})[place] = None
    return {column: list(places) for column, places in found.items()}


def _column(place: str) -> str:
    """The kept column of a place; empty for other places."""
    return place.removeprefix("field ") if place.startswith("field ") else ""


def _holds(name: str | None, groups: list[str]) -> bool:
    return any(group in (name or "").casefold() for group in groups if group)
