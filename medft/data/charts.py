"""Bar charts as inline SVG: numbers in, SVG text out."""

import html
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_BLUE = "#0b6bcb"

_WIDTH, _ROW = 350, 22
_LEFT, _LONGEST = 116, 150
"""Where bars begin, and the longest one, in user units."""

_SHORTEST = 1.5
"""Of a bar that is not zero, so that it is seen."""


class Bar(NamedTuple):
    """A bar with its label on the left and its number on the right."""

    label: str
    value: int
    color: str = _BLUE


def binned(counts: Mapping[int, int], edges: Sequence[int]) -> list[Bar]:
    """A bar for each bin, from the first bin to the last that hold anything.

    Args:
        counts: how often each number, 1 or more, was counted.
        edges: largest number of each bin, ascending; one more bin holds what is above them.
    """
    sums = [0] * (len(edges) + 1)
    for number, count in counts.items():
        sums[bisect_left(edges, number)] += count
    lows = [1, *(edge + 1 for edge in edges)]
    labels = [
        f"{low:,}" if low == high else f"{low:,} to {high:,}"
        for low, high in zip(lows, edges, strict=False)
    ]
    labels.append(f"over {edges[-1]:,}")
    filled = [index for index, count in enumerate(sums) if count]
    if not filled:
        return []
    return [Bar(labels[index], sums[index]) for index in range(filled[0], filled[-1] + 1)]


def chart(title: str, note: str, bars: Sequence[Bar]) -> str:
    """A heading, horizontal bars as SVG, and what they count.

    Args:
        title: the heading.
        note: a sentence below.
        bars: from top to bottom.
    """
    head = f'<div class="chart"><h3>{html.escape(title)}</h3>'
    foot = f'<p class="note">{html.escape(note)}</p></div>'
    if not bars:
        return f'{head}<p class="note">None.</p>{foot}'
    most = max(bar.value for bar in bars)
    rows = [_row(bar, 6 + _ROW * index, most) for index, bar in enumerate(bars)]
    spoken = ", ".join(f"{bar.label}: {bar.value:,}" for bar in bars)
    return (
        f'{head}<svg viewBox="0 0 {_WIDTH} {_ROW * len(bars) + 12}" role="img" '
        f'aria-label="{html.escape(f"{title}: {spoken}")}">{"".join(rows)}</svg>{foot}'
    )


def _row(bar: Bar, top: int, most: int) -> str:
    width = max(_LONGEST * bar.value / most, _SHORTEST) if bar.value else 0
    base = top + 15
    return (
        f'<text class="s" x="{_LEFT - 8}" y="{base}" text-anchor="end">{html.escape(bar.label)}'
        f'</text><rect x="{_LEFT}" y="{top + 3}" width="{width:.1f}" height="{_ROW - 6}" rx="2" '
        f'fill="{html.escape(bar.color)}"/><text x="{_LEFT + width + 6:.1f}" y="{base}">'
        f"{bar.value:,}</text>"
    )
