"""The HTML page of the demo: steps, data, scores and examples, in one file without links."""

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medft.data.images import open_image
from medft.data.pairs import read_rows
from medft.data.rows import load_rows
from medft.evaluation.evaluate import read_predictions, shown_images
from medft.evaluation.report import evaluation_sections, run_sections
from medft.evaluation.seen import choice_line
from medft.models.saved import RunLayout
from medft.pages import figure, inline, page, table, thumbnail_of

SHOWN_PAIRS = 4
"""Number of pairs of each source on the page."""

TITLES = {
    "decoder": "The decoder writes reports",
    "siglip": "SigLIP finds the text of an image, and the image of a text",
}


def write_demo_report(
    out: Path,
    summary: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, Any]],
    seconds: Mapping[str, float],
) -> Path:
    """Write report.html into the demo's folder; returns its path.

    Args:
        out: the demo's folder, with all other results.
        summary: of the prepared data.
        metrics: of both models, under decoder and siglip.
        seconds: duration of each step.
    """
    note = (
        f"Drawn images and tiny models, {sum(seconds.values()):.0f} seconds on this computer. "
        f"Scores compare texts; nothing here is a medical result. For research use."
    )
    rows = load_rows(out / "data" / "chat" / "validation.jsonl", split="validation")
    sections = []
    for kind, title in TITLES.items():
        sections.append(f"<h2>{title}</h2>")
        found = read_predictions(out / "evaluation" / kind / "predictions.jsonl")
        warning = html.escape(choice_line(metrics[kind]))
        sections += [f'<p class="warning">{warning}</p>'] if warning else []
        sections += evaluation_sections(found, metrics[kind], shown_images(rows, found))
    sections += [_new_images(out), _data(out, summary), _steps(seconds)]
    for kind in TITLES:
        sections += run_sections(RunLayout(out / kind))
    report = out / "report.html"
    report.write_text(page("medft demo", note, sections), encoding="utf-8")
    return report


def _steps(seconds: Mapping[str, float]) -> str:
    rows = [[name, f"{spent:.1f} s"] for name, spent in seconds.items()]
    return f"<h2>What ran</h2>{table(['step', 'time'], rows)}"


def _new_images(out: Path) -> str:
    figures = []
    with (out / "predictions.jsonl").open(encoding="utf-8") as file:
        for line in map(json.loads, file):
            image = inline(thumbnail_of(open_image(Path(line["image"]))), "jpeg")
            near = line["nearest"][0]
            text = f"{line['text']} (nearest case, {near['similarity']:.2f}: {near['text']})"
            figures.append(figure(image, "", text))
    return (
        '<h2>New images</h2><p class="note">What medft predict writes for images that no table '
        "names: the merged decoder's report, and SigLIP's nearest training case.</p>"
        f'<div class="pairs">{"".join(figures)}</div>'
    )


def _data(out: Path, summary: Mapping[str, Any]) -> str:
    rows, first = [], 0
    places: list[int] = []
    for name, counts in summary["sources"].items():
        reasons = ", ".join(f"{reason} {count}" for reason, count in counts["reasons"].items())
        numbers = [counts[key] for key in ("read", "accepted", "rejected", "pairs")]
        rows.append([name, *numbers, reasons])
        places += range(first, first + SHOWN_PAIRS)
        first += counts["pairs"]
    figures = [
        figure(inline(thumbnail_of(open_image(image["bytes"])), "jpeg"), row["source"], row["text"])
        for row in read_rows(out / "data" / "pairs.parquet", places)
        for image in row["images"][:1]
    ]
    with (out / "data" / "rejects.jsonl").open(encoding="utf-8") as file:
        rejects = [list(json.loads(line).values()) for line in file]
    splits = ", ".join(f"{split} {count}" for split, count in summary["splits"].items())
    head = ["source", "rows read", "accepted", "rejected", "pairs", "reasons"]
    return (
        f"<h2>Data</h2>{table(head, rows)}<p class='note'>{html.escape(splits)}; "
        f"{summary['groups']:,} patients, none in two splits.</p>"
        f'<div class="pairs">{"".join(figures)}</div><h3>Rejected rows</h3>'
        f"{table(['source', 'row', 'reason', 'detail'], rejects)}"
    )
