"""The demo's page: data, curves and records of its runs, in one file without links."""

import html
import json
from pathlib import Path
from typing import Any

from medft.data.pairs import read_pairs
from medft.data.report import inline, page, table
from medft.runs import read_record


def write_report(out: Path, summary: dict[str, Any], *, seconds: float) -> Path:
    """Write report.html into the demo's folder; returns its path.

    Args:
        out: the demo's folder, its runs finished.
        summary: of the prepared data.
        seconds: that the demo took.
    """
    sections = [_data_section(out, summary)]
    sections += [_run_section(out / kind) for kind in ("siglip", "decoder")]
    note = (
        f"Drawn pictures, tiny random base models, {seconds:.0f} seconds on this computer. "
        f"Nothing here is a medical result; medft is for research use."
    )
    report = out / "report.html"
    report.write_text(page("medft demo", note, sections), encoding="utf-8")
    return report


def _data_section(out: Path, summary: dict[str, Any]) -> str:
    rows = []
    for name, counts in summary["sources"].items():
        reasons = ", ".join(f"{reason} {count}" for reason, count in counts["reasons"].items())
        rows.append([name, counts["read"], counts["accepted"], counts["rejected"], reasons])
    splits = ", ".join(f"{split} {count}" for split, count in summary["splits"].items())
    figures = []
    for row, _ in zip(read_pairs(out / "data" / "pairs.parquet"), range(12), strict=False):
        picture = inline(row["images"][0]["bytes"])
        text = html.escape(row["text"])
        figures.append(
            f'<figure><img src="{picture}" alt=""><figcaption>{text}</figcaption></figure>'
        )
    head = ["source", "rows read", "accepted", "rejected", "reasons"]
    return (
        f"<h2>Data</h2>{table(head, rows)}<p class='note'>{splits}; "
        f"{summary['groups']} groups, none in two splits.</p>"
        f'<h2>Pairs</h2><div class="pairs">{"".join(figures)}</div>'
    )


def _run_section(run: Path) -> str:
    record = read_record(run)
    history = json.loads((run / "log_history.json").read_text(encoding="utf-8"))
    losses = [entry["loss"] for entry in history if "loss" in entry]
    batch = record["batch"]
    rows = [
        ["status", record["status"]],
        ["first and last logged loss", f"{losses[0]:.3f}, {losses[-1]:.3f}"],
        *([name, _figure(value)] for name, value in record["metrics"].items()),
        ["trained parameters", f"{record['trainable_parameters']:,}"],
        ["of", f"{record['total_parameters']:,}"],
        ["steps", f"{batch['steps']} of {batch['effective']} rows"],
    ]
    curves = inline((run / "curves.png").read_bytes())
    return (
        f'<h2>{run.name}</h2><img class="curves" src="{curves}" alt="curves of {run.name}">'
        f"{table(['figure', 'value'], rows)}"
    )


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
