"""The sentences of a text as pieces: phrases of a lexicon, marks and other words."""

import html
import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

from medft.metrics.lexicon import Lexicon

_ATTRIBUTES = r"""(?:\s+[\w-]+=(?:"[^"]*"|'[^']*'|[^\s<>"']+))*\s*/?>"""
_TAG = re.compile(rf"</?[a-z][a-z0-9]*{_ATTRIBUTES}", re.IGNORECASE)
_BREAK = re.compile(
    rf"(?i:</?(?:br|p|li|div|tr|td|ul|ol|h\d){_ATTRIBUTES})"
    r"|\n[^\S\n]*(?:[-*\u2022]|\d+[.)])(?=\s)"  # an item of a list
    r"|\n(?=[^\S\n]*[A-Z][a-z])"  # a line that begins a sentence
)
_QUERY = re.compile(r"(?<!\S)\?(?=\w)")
_TOKEN = re.compile(
    r"[^\W_]+"
    r"|[,:;|]"
    r"|[.!?](?!\w)|(?<=[^\W\d_]{3})[.!?](?=[^\W\d_]{2})"  # "No effusion.Left opacity"
    r"|(?<=\s)[-\u2013\u2014](?=\s)"
    r"|\n\s*\n"
)
_OTHER_SCRIPT = re.compile(r"[^\W\d_\u0000-\u03ff\u1e00-\u1fff]")
"""Letters other than Latin and Greek ones."""

_MARKS = {",": "comma", "-": "comma", "\u2013": "comma", "\u2014": "comma", ":": "colon"}
"""Kinds of marks within a sentence; the others end it."""

CLAIMS = ("finding", "normal", "abnormality")
"""Kinds of pieces that assert something unless they are negated or not stated."""


class Piece(NamedTuple):
    """A phrase of the lexicon found in a text, a mark, or another word."""

    kind: str
    """finding, side, normal, abnormality, a list of cues, comma, colon, stop, answer, or word."""

    name: str
    """Name of the finding or side, yes or no of an answer; else empty."""

    first: str
    """Its first word, or the mark."""


def pieces_of(text: str, lexicon: Lexicon) -> list[Piece]:
    """The pieces of a text; at each word the longest phrase is matched."""
    plain = unicodedata.normalize("NFKC", html.unescape(text))
    plain = _QUERY.sub("query ", _TAG.sub(" ", _BREAK.sub("\n\n", plain))).casefold()
    plain = plain.replace(">", " greater than ").replace("<", " less than ")
    if _OTHER_SCRIPT.search(plain):
        return [Piece("foreign", "", "")]
    tokens = _TOKEN.findall(plain)
    pieces, place = [], 0
    while place < len(tokens):
        first, length = tokens[place], 1
        if first[0].isalnum():
            length, (kind, name) = lexicon.longest(tokens, place)
            if kind == "finding":
                within = (lexicon.phrases.get((token,)) for token in tokens[place : place + length])
                pieces += [Piece("side", one[1], "") for one in within if one and one[0] == "side"]
            pieces.append(Piece(kind, name, first))
        else:
            pieces.append(Piece(_MARKS.get(first, "stop"), "", first))
        place += length
    return pieces


def sentences_of(pieces: list[Piece], lexicon: Lexicon) -> Iterator[list[Piece]]:
    """The pieces of each sentence; a question and its answer are one."""
    sentence: list[Piece] = []
    for place, piece in enumerate(pieces):
        answer = _answer(pieces[max(place - 1, 0) : place + 2], lexicon)
        after = pieces[place + 1 : place + 2]
        if answer and place:
            sentence.append(Piece("answer", answer, piece.first))
        elif piece.kind == "stop":
            sentence.append(piece)
            if not _answer(pieces[place : place + 3], lexicon):
                yield sentence
                sentence = []
        else:
            if piece.first in lexicon.words.sections and after and after[0].kind == "colon":
                yield sentence
                sentence = []
            sentence.append(piece)
    yield sentence


def _answer(window: list[Piece], lexicon: Lexicon) -> str:
    """Yes or no, if the second piece of a window answers what precedes the first; else ""."""
    if len(window) < 2 or window[0].first not in (":", "?", "-", "\u2013", "\u2014", "|"):
        return ""
    if len(window) == 3 and window[2].kind not in ("comma", "stop"):
        return ""
    if window[1].first in lexicon.words.negative:
        return "no"
    return "yes" if window[1].first in lexicon.words.positive else ""
