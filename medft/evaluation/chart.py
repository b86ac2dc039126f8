"""Scores and their intervals as an SVG chart."""

import html
from collections.abc import Mapping
from typing import Any

from medft.evaluation.labels import COLORS, label


def chart(metrics: Mapping[str, Any]) -> str:
    """Points and whiskers as SVG, a row per metric and system, from 0 to 1 (BLEU 0 to 100)."""
    systems = metrics["systems"]
    parts, y = [], 8
    for metric in systems["tuned"]:
        if metric.endswith("median_rank") or systems["tuned"][metric]["value"] is None:
            continue
        y += 20
        parts.append(f'<text x="12" y="{y}" font-weight="600">{html.escape(label(metric))}</text>')
        for name, figures in systems.items():
            y += 18
            parts.append(_whisker(figures[metric], y, name, 100 if metric == "bleu" else 1))
        y += 8
    grid = "".join(
        f'<line x1="{x}" x2="{x}" y1="8" y2="{y}" stroke="#e8edf1"/>'
        f'<text class="s" x="{x}" y="{y + 16}" text-anchor="middle">{value:g}</text>'
        for value in (0, 0.25, 0.5, 0.75, 1)
        for x in [_across(value)]
    )
    return (
        f'<h3>Scores and their 95 % intervals</h3><div class="scroll"><svg '
        f'viewBox="0 0 680 {y + 26}" role="img" aria-label="scores by system">'
        f"{grid}{''.join(parts)}</svg></div>"
    )


def _across(value: float) -> float:
    return 190 + 400 * value


def _whisker(estimate: Mapping[str, Any], y: int, system: str, whole: float) -> str:
    name = f'<text class="s" x="24" y="{y}">{html.escape(label(system))}</text>'
    if estimate["value"] is None:
        return f'{name}<text class="s" x="190" y="{y}">{html.escape(estimate["reason"])}</text>'
    color, middle = COLORS[system], y - 4
    at = _across(estimate["value"] / whole)
    line = ""
    if estimate["low"] is not None:
        low, high = (_across(estimate[end] / whole) for end in ("low", "high"))
        line = (
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}" '
            f'stroke="{color}" stroke-width="3" stroke-opacity=".4"/>'
        )
    return (
        f'{name}{line}<circle cx="{at:.1f}" cy="{middle}" r="4.5" fill="{color}"/>'
        f'<text x="612" y="{y}">{estimate["value"]:.3g}</text>'
    )
