"""The demo's page: data, curves and records of its runs, in one file without links."""

import base64
import html
import json
from pathlib import Path
from typing import Any

from medft.data.pairs import read_pairs
from medft.runs import read_record

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b2733; background: #f6f7f9; margin: 0 }
main { max-width: 64rem; margin: 0 auto; padding: 2rem 1rem }
h1 { font-size: 1.8rem; margin: 0 } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem }
p.note { color: #5a6b7b; margin: .2rem 0 0 }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .8rem }
figure { margin: 0; padding: .5rem; background: #fff }
figure { border: 1px solid #dde3e9; border-radius: 6px }
figure img { width: 100%; image-rendering: pixelated; border-radius: 4px; display: block }
figcaption { font-size: .85rem; margin-top: .4rem }
img.curves { width: 100%; background: #fff; border: 1px solid #dde3e9; border-radius: 6px }
.scroll { overflow-x: auto }
table { border-collapse: collapse; background: #fff; min-width: 60% }
th, td { text-align: left; padding: .35rem .8rem; border: 1px solid #dde3e9 }
td.n { text-align: right; font-variant-numeric: tabular-nums }
"""


def write_report(out: Path, summary: dict[str, Any], *, seconds: float) -> Path:
    """Write report.html into the demo's folder; returns its path.

    Args:
        out: the demo's folder, its runs finished.
        summary: of the prepared data.
        seconds: that the demo took.
    """
    sections = [_data_section(out, summary)]
    sections += [_run_section(out / kind) for kind in ("siglip", "decoder")]
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>medft demo</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>
<body><main><h1>medft demo</h1>
<p class="note">Drawn pictures, tiny random base models, {seconds:.0f} seconds on this computer.
Nothing here is a medical result; medft is for research use.</p>
{"".join(sections)}</main></body></html>"""
    report = out / "report.html"
    report.write_text(page, encoding="utf-8")
    return report


def _data_section(out: Path, summary: dict[str, Any]) -> str:
    rows = []
    for name, counts in summary["sources"].items():
        reasons = ", ".join(f"{reason} {count}" for reason, count in counts["reasons"].items())
        rows.append([name, counts["read"], counts["accepted"], counts["rejected"], reasons])
    splits = ", ".join(f"{split} {count}" for split, count in summary["splits"].items())
    figures = []
    for row, _ in zip(read_pairs(out / "data" / "pairs.parquet"), range(12), strict=False):
        picture = _inline(row["images"][0]["bytes"])
        text = html.escape(row["text"])
        figures.append(
            f'<figure><img src="{picture}" alt=""><figcaption>{text}</figcaption></figure>'
        )
    head = ["source", "rows read", "accepted", "rejected", "reasons"]
    return (
        f"<h2>Data</h2>{_table(head, rows)}<p class='note'>{splits}; "
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
    curves = _inline((run / "curves.png").read_bytes())
    return (
        f'<h2>{run.name}</h2><img class="curves" src="{curves}" alt="curves of {run.name}">'
        f"{_table(['figure', 'value'], rows)}"
    )


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _table(head: list[str], rows: list[list[Any]]) -> str:
    def cell(value: Any) -> str:
        kind = ' class="n"' if isinstance(value, int) else ""
        return f"<td{kind}>{html.escape(str(value))}</td>"

    header = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{header}</tr>{body}</table></div>'


def _inline(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"
