"""report.html of prepared data: what to look at first, then sources, sample pairs, rejected rows.

One self-contained page with embedded thumbnails, without scripts.
"""

import html
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from medft.data.charts import Bar, binned, chart
from medft.data.images import open_image
from medft.data.pairs import SPLITS, read_pairs, read_rows
from medft.data.sentences import SHOWN_NAMES, Sentence, all_sentences
from medft.data.statistics import Statistics, spread
from medft.pages import figure, inline, page, shortened, table, thumbnail_of

SHOWN_REJECTS = 5
"""Rejected rows shown per reason."""

_WORDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"""Largest number of words of each bin."""

_PIXELS = (128, 256, 512, 1024, 2048, 4096)
"""Largest longer side of each bin."""

_GRAY = "#9aa7b3"


def write_data_report(pairs: Path, rejects: Path, summary: dict[str, Any], target: Path) -> None:
    """Write report.html of prepared data.

    Args:
        pairs: pairs.parquet.
        rejects: rejects.jsonl.
        summary: as in summary.json.
        target: path of the page.
    """
    statistics = Statistics()
    for index, row in enumerate(read_pairs(pairs, images=False)):
        statistics.add(index, row)
    drawn = statistics.drawn()
    repeated = {name: statistics.repeated(name) for name in summary["sources"]}
    wanted = sorted(drawn.union(*repeated.values()))
    figures: dict[str, list[str]] = defaultdict(list)
    texts: dict[int, str] = {}
    for index, row in zip(wanted, read_rows(pairs, wanted), strict=True):
        texts[index] = shortened(row["text"], 80)
        if index in drawn:
            figures[row["source"]].append(_figure(row))
    sections = [
        _cards(summary, statistics),
        _sentences(summary),
        _charts(summary, statistics),
        _sources(summary),
        _groups(summary),
        _identifiers(summary),
    ]
    for name in summary["sources"]:
        counted = [(texts[index], count) for index, count in repeated[name].items()]
        sections.append(f"<h2>{html.escape(name)}</h2>")
        sections.append(_measures(statistics, name, counted))
        sections.append(f'<div class="pairs">{"".join(figures[name])}</div>')
    sections.append(_rejects(rejects))
    note = "Prepared by medft. For research use; medft does not de-identify."
    content = page("Prepared data", note, sections)
    target.write_text(content, encoding="utf-8", errors="backslashreplace")


def _cards(summary: dict[str, Any], statistics: Statistics) -> str:
    """The numbers that one looks for first."""
    sources = summary["sources"].values()
    read, rejected = (sum(counts[key] for counts in sources) for key in ("read", "rejected"))
    uses = sum(sum(sides.values()) for sides in statistics.sides.values())
    cards = [
        (summary["pairs"], "pairs", f"of {read:,} rows read"),
        (summary["groups"], "groups", f"largest: {summary['largest_group']:,} pairs"),
        (statistics.images, "images", f"{uses:,} with repeats"),
        (rejected, "rows rejected", f"of {read:,}, {_percent(rejected, read)}"),
    ]
    for split, pairs in _splits(summary).items():
        below = f"{_percent(pairs, summary['pairs'])} of pairs, {statistics.groups(split):,} groups"
        cards.append((pairs, split, below))
    shown = "".join(
        f'<div class="card"><b>{number:,}</b>{name}<br><span>{below}</span></div>'
        for number, name, below in cards
    )
    return f'<div class="cards">{shown}</div>'


def _splits(summary: dict[str, Any]) -> dict[str, int]:
    """Numbers of pairs, train first."""
    splits = summary["splits"]
    return {split: splits[split] for split in SPLITS if split in splits}


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.1f} %"


def _sentences(summary: dict[str, Any]) -> str:
    """The sentences on what was counted, those that need a look in a list of warnings."""
    warnings: dict[str, list[Sentence]] = defaultdict(list)
    notes = ""
    for one in all_sentences(summary):
        if one.needs_look:
            warnings[one.topic or one.text].append(one)
        else:
            notes += f'<p class="note">{html.escape(one.text)}</p>'
    items = "".join(_warning(topic, some) for topic, some in warnings.items())
    return f'<ul class="warning">{items}</ul>{notes}' if items else notes


def _warning(topic: str, sentences: list[Sentence]) -> str:
    """Items of a list; of many sources one item that opens, so that what follows stays near."""
    items = "".join(f"<li>{html.escape(one.text)}</li>" for one in sentences)
    if len(sentences) <= SHOWN_NAMES:
        return items
    total = sum(one.count for one in sentences)
    line = html.escape(f"{total:,} {topic}, in {len(sentences):,} sources")
    return f"<li><details><summary>{line}</summary><ul>{items}</ul></details></li>"


def _charts(summary: dict[str, Any], statistics: Statistics) -> str:
    """Lengths of texts, sizes of images and the split, over all sources."""
    words, sides = (sum(c.values(), Counter()) for c in (statistics.words, statistics.sides))
    splits = []
    for split, pairs in _splits(summary).items():
        splits += [Bar(split, pairs), Bar("its groups", statistics.groups(split), _GRAY)]
    charts = [
        chart("Pairs and groups by split", "A group may have several pairs.", splits),
        chart(
            "Lengths of texts",
            "Pairs by number of words; words are what blanks separate.",
            binned(words, _WORDS),
        ),
        chart(
            "Sizes of images",
            "Images by longer side in pixels, each as often as pairs have it.",
            binned(sides, _PIXELS),
        ),
    ]
    return f'<div class="charts">{"".join(charts)}</div>'


def _sources(summary: dict[str, Any]) -> str:
    counted = {
        "na_cells": "cells emptied by na_values",
        "lines": "lines of CSV",
        "records": "records of CSV",
    }
    sources = summary["sources"]
    counted = {k: name for k, name in counted.items() if any(c.get(k) for c in sources.values())}
    rows = []
    for name, counts in sources.items():
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in counts["reasons"].items())
        numbers = [counts[key] for key in ("read", "accepted", "rejected", "pairs")]
        table_counts = [counts.get(key, "") for key in counted]
        rows.append([name, *numbers, reasons, counts["grouped_by"], *table_counts])
    head = ["source", "rows read", "accepted", "rejected", "pairs", "reasons", "split by"]
    return f"<h2>Sources</h2>{table([*head, *counted.values()], rows)}"


def _groups(summary: dict[str, Any]) -> str:
    joins = [[name.replace("_", " "), count] for name, count in summary["joins"].items()]
    joins.append(["pairs in the largest group", summary["largest_group"]])
    joins += [
        [f"shared by {names}", count] for names, count in summary["shared_by_sources"].items()
    ]
    return f"<h2>Groups</h2>{table(['', 'count'], joins)}"


def _identifiers(summary: dict[str, Any]) -> str:
    """Counts of the search for identifiers, and of what was hashed with the key."""
    rows = []
    for name, counts in summary["sources"].items():
        for column, one in counts["identifiers"].items():
            numbers = [counts["searched"], one["found"], one["not_searched"], one["empty"]]
            where = ", ".join(f"{place} {count:,}" for place, count in one["where"].items())
            rows.append([name, column, *numbers, where, counts["on_identifier"]])
    head = ["source", "column", "pairs", "found", "not searched", "empty", "where", "then"]
    note = (
        "An exact search of the values that a row has in the named columns, in its other cells and "
        "file names; this is no de-identification. Not searched: pairs in which a value or a part "
        "of it is too short, or is a particle."
    )
    return f"<h2>Identifiers</h2>{table(head, rows)}<p class='note'>{note}</p>" if rows else ""


def _measures(statistics: Statistics, source: str, repeated: list[tuple[str, int]]) -> str:
    """Lengths, sizes, shapes and licenses of a source, and its most frequent texts."""
    rows = [
        ["words of text", *spread(statistics.words[source])],
        ["longer side, pixels", *spread(statistics.sides[source])],
    ]
    images = sum(statistics.sides[source].values())
    notes = [
        f"{images:,} images: {_counted(statistics.shapes[source])}",
        f"licenses: {_counted(statistics.licenses[source])}",
    ]
    if repeated:
        texts = ", ".join(f'"{text}" {count:,}' for text, count in repeated)
        notes.append(f"most frequent texts: {texts}")
    head = ["", "least", "5\u00a0%", "median", "95\u00a0%", "most"]
    lines = "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)
    return table(head, rows) + lines


def _counted(counts: Counter[str]) -> str:
    shown = [f"{shortened(name, 80)} {count:,}" for name, count in counts.most_common(5)]
    others = len(counts) - len(shown)
    return ", ".join([*shown, *([f"and {others:,} others"] if others else [])])


def _figure(row: dict[str, Any]) -> str:
    # as many pixels as this image has: SOURCES.yaml may have raised the limit
    limit = row["width"][0] * row["height"][0]
    image = open_image(row["images"][0]["bytes"], max_pixels=limit)
    more = f" (1 of {len(row['images'])} images)" if len(row["images"]) > 1 else ""
    question, text = shortened(row["question"] or "", 160), shortened(row["text"], 240)
    return figure(inline(thumbnail_of(image), "jpeg"), question, text + more)


def _rejects(path: Path) -> str:
    examples: dict[str, list[list[Any]]] = defaultdict(list)
    counts: Counter[str] = Counter()
    with path.open(encoding="utf-8") as file:
        for line in map(json.loads, file):
            counts[line["reason"]] += 1
            if len(examples[line["reason"]]) < SHOWN_REJECTS:
                detail = shortened(line["detail"], 200)
                examples[line["reason"]].append([line["source"], line["row"], detail])
    if not counts:
        return "<h2>Rejected rows</h2><p class='note'>None.</p>"
    parts = [
        f"<h3>{html.escape(reason)}: {count:,}</h3>"
        f"{table(['source', 'row', 'detail'], examples[reason])}"
        for reason, count in counts.most_common()
    ]
    return f"<h2>Rejected rows</h2>{''.join(parts)}"
