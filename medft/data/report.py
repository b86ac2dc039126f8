"""report.html of prepared data: sources, splits, statistics, sample pairs and rejected rows.

One self-contained page with embedded thumbnails.
"""

import hashlib
import heapq
import html
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from medft.data.images import open_image
from medft.data.pairs import read_pairs, read_rows
from medft.pages import figure, inline, page, table, thumbnail_of

SHOWN_PAIRS = 12
"""Pairs shown per source, sampled by a hash of their ids."""

SHOWN_REJECTS = 5
"""Rejected rows shown per reason."""


def write_data_report(pairs: Path, rejects: Path, summary: dict[str, Any], target: Path) -> None:
    """Write report.html of prepared data.

    Args:
        pairs: pairs.parquet.
        rejects: rejects.jsonl.
        summary: as in summary.json.
        target: path of the page.
    """
    facts = _Facts()
    for index, row in enumerate(read_pairs(pairs, images=False)):
        facts.add(index, row)
    sheets: dict[str, list[str]] = defaultdict(list)
    for row in read_rows(pairs, facts.shown()):
        sheets[row["source"]].append(_figure(row))
    sections = [_groups(summary), _sources(summary), _splits(summary, facts), _identifiers(summary)]
    for name in summary["sources"]:
        sections.append(f"<h2>{html.escape(name)}</h2>")
        sections.append(_measures(facts, name))
        sections.append(f'<div class="pairs">{"".join(sheets[name])}</div>')
    sections.append(_rejects(rejects))
    note = "Prepared by medft. For research use; medft does not de-identify."
    target.write_text(page("Prepared data", note, sections), encoding="utf-8")


def group_lines(summary: dict[str, Any]) -> list[str]:
    """What was counted about groups, in sentences for the terminal and the page.

    Args:
        summary: as in summary.json.
    """
    sources = summary["sources"]
    divided, kept = summary["shared_between_splits"], summary["kept"]
    lines = ["No group stands in two splits."]
    if divided["groups"]:
        lines = [
            f"{divided['groups']:,} groups ({divided['pairs']:,} pairs) stand in several splits, "
            f"as the table's split has them."
        ]
    if sum(counts["grouped_by"] != "image" for counts in sources.values()) > 1:
        between = "; ".join(f"{names} {n:,}" for names, n in summary["shared_by_sources"].items())
        lines.append(
            f"{summary['shared_group_values']:,} group values stand in several sources"
            f"{f' ({between})' if between else ''}; a patient who has others there is not found."
        )
    for name, counts in sources.items():
        if counts["grouped_by"] == "image":
            lines.append(
                f"{name} is split by image: without a group column, whether a patient stands in "
                f"two splits cannot be checked."
            )
        if counts["empty_groups"]:
            became = "rejected" if counts["empty_group"] == "reject" else "grouped by image"
            lines.append(
                f"{name}: {counts['empty_groups']:,} rows have no {counts['grouped_by']} and were "
                f"{became}."
            )
        if counts["not_in_group_map"]:
            lines.append(
                f"{name}: {counts['not_in_group_map']:,} values of {counts['grouped_by']} are not "
                f"in its group_map."
            )
    if kept:
        lines.append(
            f"{kept['groups']:,} groups ({kept['pairs']:,} pairs) keep the split of the earlier "
            f"file, {kept['not_found']:,} of its groups are not among the rows."
        )
    return lines


class _Facts:
    """Statistics over all rows, without their images."""

    def __init__(self) -> None:
        self.words: dict[str, list[int]] = defaultdict(list)
        self.sides: dict[str, list[int]] = defaultdict(list)
        self.shapes: dict[str, Counter[str]] = defaultdict(Counter)
        self.images: Counter[str] = Counter()
        self.licenses: dict[str, Counter[str]] = defaultdict(Counter)
        self.texts: dict[str, Counter[str]] = defaultdict(Counter)
        self.groups: dict[str, set[str]] = defaultdict(set)
        self._drawn: dict[str, list[tuple[str, int]]] = defaultdict(list)

    def add(self, index: int, row: dict[str, Any]) -> None:
        source = row["source"]
        self.words[source].append(len(row["text"].split()))
        self.texts[source][row["text"][:200]] += 1
        self.licenses[source][row["license"] or "none given"] += 1
        self.groups[row["split"]].add(row["group_id"])
        self.images[source] += len(row["width"])
        for width, height in zip(row["width"], row["height"], strict=True):
            self.sides[source].append(max(width, height))
            self.shapes[source][_shape(width, height)] += 1
        draw = (hashlib.sha256(row["id"].encode()).hexdigest(), index)
        drawn = self._drawn[source]
        drawn.append(draw)
        if len(drawn) > 50 * SHOWN_PAIRS:
            self._drawn[source] = heapq.nsmallest(SHOWN_PAIRS, drawn)

    def shown(self) -> set[int]:
        return {
            index
            for drawn in self._drawn.values()
            for _, index in heapq.nsmallest(SHOWN_PAIRS, drawn)
        }


def _shape(width: int, height: int) -> str:
    ratio = width / height
    if ratio > 2.5 or ratio < 0.4:
        return "extreme"
    if 0.9 <= ratio <= 1.1:
        return "square"
    return "landscape" if ratio > 1 else "portrait"


def _sources(summary: dict[str, Any]) -> str:
    rows = []
    for name, counts in summary["sources"].items():
        reasons = ", ".join(f"{reason} {count}" for reason, count in counts["reasons"].items())
        numbers = [counts[key] for key in ("read", "accepted", "rejected", "pairs")]
        rows.append([name, *numbers, reasons, counts["grouped_by"]])
    head = ["source", "rows read", "accepted", "rejected", "pairs", "reasons", "split by"]
    return f"<h2>Sources</h2>{table(head, rows)}"


def _groups(summary: dict[str, Any]) -> str:
    """The sentences on groups, where one looks first."""
    first, *others = group_lines(summary)
    divided = summary["shared_between_splits"]["groups"]
    kinds = ["warning" if divided else "note", *("warning" for _ in others)]
    return "".join(
        f'<p class="{kind}">{html.escape(line)}</p>'
        for kind, line in zip(kinds, [first, *others], strict=True)
    )


def _splits(summary: dict[str, Any], facts: _Facts) -> str:
    splits = summary["splits"]
    rows = [[split, count, len(facts.groups[split])] for split, count in splits.items()]
    joins = [[name.replace("_", " "), count] for name, count in summary["joins"].items()]
    joins.append(["pairs in the largest group", summary["largest_group"]])
    return (
        f"<h2>Splits</h2>{table(['split', 'pairs', 'groups'], rows)}"
        f"<h3>Groups</h3>{table(['', 'count'], joins)}"
    )


def _identifiers(summary: dict[str, Any]) -> str:
    """Counts of the search for identifiers, and whether group ids stand in the clear."""
    rows = []
    for name, counts in summary["sources"].items():
        for column, one in counts["identifiers"].items():
            numbers = [counts["searched"], one["found"], one["not_searched"], one["empty"]]
            where = ", ".join(f"{place} {count}" for place, count in one["where"].items())
            rows.append([name, column, *numbers, where, counts["on_identifier"]])
    head = ["source", "column", "pairs", "found", "not searched", "empty", "where", "then"]
    note = (
        "An exact search of the values that a row has in the named columns, in its other cells and "
        "file names; this is no de-identification. Not searched: pairs in which a value or a part "
        "of it is too short, or is a particle."
    )
    section = f"<h2>Identifiers</h2>{table(head, rows)}<p class='note'>{note}</p>" if rows else ""
    ids = "Group ids are keyed hashes."
    if summary["group_ids"] == "clear":
        ids = "Group ids stand in the clear in pairs.parquet; group_key makes them keyed hashes."
    return f"{section}<p class='note'>{ids}</p>"


def _measures(facts: _Facts, source: str) -> str:
    def spread(values: list[int]) -> list[Any]:
        low, middle, high = np.percentile(values or [0], [5, 50, 95]).round().astype(int).tolist()
        return [min(values, default=0), low, middle, high, max(values, default=0)]

    rows = [
        ["words of a text", *spread(facts.words[source])],
        ["longer side of an image, pixels", *spread(facts.sides[source])],
    ]
    shapes = ", ".join(f"{name} {count}" for name, count in facts.shapes[source].most_common())
    licenses = ", ".join(f"{name} {count}" for name, count in facts.licenses[source].most_common(5))
    repeated = [
        f"{text[:80]!r} {count}" for text, count in facts.texts[source].most_common(3) if count > 1
    ]
    notes = [f"{facts.images[source]:,} images: {shapes}", f"licenses: {licenses}"]
    notes += [f"most frequent texts: {', '.join(repeated)}"] if repeated else []
    head = ["", "least", "5 %", "median", "95 %", "most"]
    lines = "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)
    return table(head, rows) + lines


def _figure(row: dict[str, Any]) -> str:
    image = inline(thumbnail_of(open_image(row["images"][0]["bytes"])), "jpeg")
    more = f" (1 of {len(row['images'])} images)" if len(row["images"]) > 1 else ""
    return figure(image, (row["question"] or "")[:160], row["text"][:240] + more)


def _rejects(path: Path) -> str:
    examples: dict[str, list[list[Any]]] = defaultdict(list)
    counts: Counter[str] = Counter()
    with path.open(encoding="utf-8") as file:
        for line in map(json.loads, file):
            counts[line["reason"]] += 1
            if len(examples[line["reason"]]) < SHOWN_REJECTS:
                detail = line["detail"][:200]
                examples[line["reason"]].append([line["source"], line["row"], detail])
    if not counts:
        return "<h2>Rejected rows</h2><p class='note'>None.</p>"
    parts = [
        f"<h3>{html.escape(reason)}: {count:,}</h3>"
        f"{table(['source', 'row', 'detail'], examples[reason])}"
        for reason, count in counts.most_common()
    ]
    return f"<h2>Rejected rows</h2>{''.join(parts)}"
