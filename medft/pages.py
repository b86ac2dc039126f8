"""Building blocks of medft's HTML pages: one style, tables, embedded images."""

import base64
import html
import io
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from PIL import Image

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b2733; background: #f6f7f9; margin: 0 }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1rem 4rem }
h1 { font-size: 1.8rem; margin: 0 } h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem }
p.note { color: #5a6b7b; margin: .3rem 0; overflow-wrap: anywhere }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .8rem }
figure { margin: 0; padding: .5rem; background: #fff }
figure { border: 1px solid #dde3e9; border-radius: 6px }
figure img { width: 100%; height: 9rem; object-fit: contain; background: #000; display: block }
figcaption { font-size: .82rem; margin-top: .4rem; overflow-wrap: anywhere }
figcaption b { display: block; color: #5a6b7b; font-weight: 500 }
img.curves { width: 100%; background: #fff; border: 1px solid #dde3e9; border-radius: 6px }
.scroll { overflow-x: auto }
table { border-collapse: collapse; background: #fff }
th, td { text-align: left; padding: .35rem .8rem; border: 1px solid #dde3e9; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums }
img.curves { display: block }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .8rem }
.card { background: #fff; border: 1px solid #dde3e9; border-radius: 8px; padding: .8rem 1rem }
.cards + p.note { margin-top: .9rem }
.card b { display: block; font-size: 1.9rem; line-height: 1.2; color: #0b6bcb }
.card span { color: #5a6b7b; font-size: .85rem }
.cases { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: .8rem }
.case { display: flex; gap: .8rem; background: #fff; border: 1px solid #dde3e9 }
.case { border-radius: 8px; padding: .6rem; font-size: .86rem; align-items: flex-start }
.case > img { width: 7rem; flex: none; background: #000; border-radius: 4px }
.case dl { margin: 0; overflow-wrap: anywhere } .case dt { color: #5a6b7b; font-size: .76rem }
.case dd { margin: 0 0 .35rem } .case p { margin: 0 0 .35rem; color: #5a6b7b }
ins { background: #ffd9d6; text-decoration: none; border-radius: 3px; padding: 0 .15em }
del { color: #a33; opacity: .75 } dd.right { color: #14703a }
svg { width: 100%; min-width: 34rem; max-width: 52rem; height: auto; display: block }
svg { background: #fff; border: 1px solid #dde3e9; border-radius: 8px }
svg text { font: 13px system-ui, sans-serif; fill: #1b2733 } svg text.s { fill: #5a6b7b }
details { margin: .6rem 0 } summary { cursor: pointer; color: #0b6bcb }
pre { background: #fff; border: 1px solid #dde3e9; padding: .8rem; overflow-x: auto }
pre { font-size: .78rem }
@media (max-width: 30rem) { td { white-space: nowrap } }
@media (max-width: 30rem) { .cases { grid-template-columns: 1fr } }
@media (max-width: 30rem) { .case > img { width: 5.5rem } }
.warning { background: #fff4d6; border: 1px solid #ecd48a }
.warning { border-radius: 6px; padding: .5rem .8rem }
ul.warning { padding-left: 1.8rem; margin: .9rem 0 } ul.warning li { overflow-wrap: anywhere }
ul.warning details { margin: 0 } ul ul { padding-left: 1.2rem }
.charts { display: grid; gap: 0 1.2rem }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)) }
.charts svg { min-width: 0 }
h2, h3 { overflow-wrap: anywhere }
td.t { white-space: normal; min-width: 10rem; max-width: 24rem; overflow-wrap: break-word }
@media (max-width: 30rem) { td.t { max-width: 11rem } }
"""

_SHORT_CELL = 24
"""Characters that stand on one line of a table on a phone."""

_CUT = " ..."

_UNSPACED = re.compile("[\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
"""Chinese and Japanese signs, which are written without blanks."""

_UNSPACED_PUNCTUATION = "\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f"


def page(title: str, note: str, sections: Iterable[str], *, warning: str = "") -> str:
    """A complete HTML page in the style of medft's reports, a warning its first line."""
    above = f'<p class="warning">{html.escape(warning)}</p>' if warning else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body><main>{above}<h1>{html.escape(title)}</h1><p class="note">{html.escape(note)}</p>
{"".join(sections)}</main></body></html>
"""


def table(head: list[str], rows: Iterable[Iterable[Any]]) -> str:
    """An HTML table; integers are right-aligned, long texts take several lines."""

    def cell(value: Any) -> str:
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        is_long = len(shown) > _SHORT_CELL
        kind = ' class="n"' if isinstance(value, int) else ' class="t"' if is_long else ""
        return f"<td{kind}>{html.escape(shown)}</td>"

    header = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{header}</tr>{body}</table></div>'


def inline(image: bytes, kind: str = "png") -> str:
    """An image as a data URL, the src of an img tag.

    Args:
        image: as medft has encoded it, from `png_of` or `thumbnail_of`; never bytes of a file.
        kind: png or jpeg.
    """
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def figure(image: str, head: str, text: str) -> str:
    """An HTML figure: an image from `inline` and its text, below a heading unless that is empty."""
    above = f"<b>{html.escape(head)}</b>" if head else ""
    caption = f"<figcaption>{above}{html.escape(text)}</figcaption>"
    return f'<figure><img src="{image}" alt="">{caption}</figure>'


def shortened(text: str, limit: int) -> str:
    """The text with single blanks, cut between two words where it is longer, which " ..." shows.

    Words are what blanks separate. Chinese and Japanese texts are cut after punctuation, else
    between two signs. Of a text whose first word is too long, the length of that word is given.

    Args:
        text: any text.
        limit: most characters that come out, 40 or more.
    """
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    ends = range(limit - len(_CUT), 0, -1)
    late = (end for end in ends if end > limit // 2 and _ends_phrase(text, end))
    end = next(late, 0) or next((end for end in ends if _is_between_words(text, end)), 0)
    if not end:
        return f"(a word of {len(text.split(maxsplit=1)[0]):,} characters){_CUT}"
    return text[:end].rstrip() + _CUT


def _ends_phrase(text: str, end: int) -> bool:
    return text[end] == " " or text[end - 1] in _UNSPACED_PUNCTUATION


def _is_between_words(text: str, end: int) -> bool:
    before, after = text[end - 1], text[end]
    if unicodedata.category(after).startswith("M"):  # it belongs to the sign before
        return False
    return " " in (before, after) or bool(_UNSPACED.match(before) or _UNSPACED.match(after))


def thumbnail_of(image: Image.Image) -> bytes:
    """A JPEG of an RGB image, at most 240 pixels wide and high."""
    small = image.copy()
    small.thumbnail((240, 240), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.save(stream, format="JPEG", quality=80)
    return stream.getvalue()


def png_of(image: Image.Image) -> bytes:
    """A PNG of an image."""
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()
