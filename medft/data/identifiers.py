"""Identifier values of a row (names, dates, numbers), searched for in the row's other texts.

An exact search of known values in their usual ways of writing; it knows no other names or dates,
and a name that is also a word (Klein, Lunge) is found as that word. This is not de-identification.

- Dates, in five ways: YYYYMMDD, YYYY-MM-DD, DD.MM.YYYY, DD/MM/YYYY and MM/DD/YYYY, with or without
  leading zeros; after dots and slashes also with the last two digits of the year.
- Numbers and codes: with their separators, with others, or with none.
- Names: each part of three letters or more as a complete word, also with a genitive s; shorter
  parts and particles (von, der) only beside such a part. Umlauts are ae, oe, ue, and a sharp s is
  ss; other accents do not count.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from medft.data.template import text_of

MASK = "[...]"
"""What stands in a masked text instead of each identifier."""

MIN_LETTERS = 3
"""Letters of the shortest part of a name that is searched for on its own."""

MIN_DIGITS = 5
"""Digits of the shortest number that is searched for; shorter ones are years, volumes and doses."""

MIN_CHARACTERS = 4
"""Letters and digits of the shortest code that is searched for."""

MAX_VALUE = 200
"""Characters of the longest value that is searched for."""

_LONG_CODE = 8
"""Characters from which a code is also found with separators where it has none."""

_PARTICLES = re.compile(
    "vo[nm]|van|de[nrmsl]|della|dos|das|zu[mr]|te[nr]|bin|ibn|abu|und|and"
    "|prof|med|dent|herr|frau|mrs|miss|geb|born|sen|jun",
    re.IGNORECASE,
)
"""Particles and titles in names; alone they would be found in every text."""

_DASH = r"\-\u2010-\u2015"
_SEPARATOR = rf"[\s{_DASH}_./\\:#,]"
_JOINT = rf"[\s,;^=._{_DASH}'\u2019]{{1,3}}"
_START, _END = r"(?<![^\W\d_])", r"(?:['\u2019]?s)?(?![^\W\d_])"
_INVISIBLE = re.compile("[\u00ad\u200b-\u200d\u2060\u0300-\u036f]")
_DIGRAPHS = {"ae": "\u00e4", "oe": "\u00f6", "ue": "\u00fc", "ss": "\u00df"}
_UMLAUTS = {sign: digraph for digraph, sign in _DIGRAPHS.items()}
_OTHERS = {
    "\u00e6": "\u00e4",
    "\u0153": "\u00f6",
    "\u00f8": "o",
    "\u0142": "l",
    "\u0111": "d",
    "\u0131": "i",
}
_FIRST_WITHOUT_SPACES = "\u2e80"
"""From here on stand the scripts of Chinese, Japanese and Korean."""

_TIME = "(?:[01][0-9]|2[0-3])[0-5][0-9](?:[0-5][0-9])?"
_DATES = [
    re.compile(rf"(?<![^\s(*,^]){way}(?=[T\s),^]|$)")
    for way in (
        "(?P<y>[0-9]{4})-(?P<m>[0-9]{1,2})-(?P<d>[0-9]{1,2})",
        r"(?P<d>[0-9]{1,2})\.\s?(?P<m>[0-9]{1,2})\.\s?(?P<y>[0-9]{4})",
        "(?P<d>[0-9]{1,2})/(?P<m>[0-9]{1,2})/(?P<y>[0-9]{4})",
        "(?P<m>[0-9]{1,2})/(?P<d>[0-9]{1,2})/(?P<y>[0-9]{4})",
        rf"(?P<y>[0-9]{{4}})(?P<m>[0-9]{{2}})(?P<d>[0-9]{{2}})(?:{_TIME}[.0-9]*(?:[+-][0-9]{{4}})?)?",
    )
]
"""Dates within a value: at its beginning or after a space, as in a name with date of birth."""


class Identifiers:
    """The identifiers of the rows of one pair, by column."""

    def __init__(self, values: Mapping[str, Iterable[Any]]) -> None:
        self._patterns: dict[str, list[re.Pattern[str]]] = {}
        self.empty: list[str] = []
        """Columns without a value."""

        self.not_searched: list[str] = []
        """Columns with a value, or a part of one, that is not searched for on its own: too short
        or too long, a particle, or in a script without spaces."""

        for column, cells in values.items():
            texts = list(dict.fromkeys(text for cell in cells for text in _texts(cell)))
            forms = [_forms(text) for text in texts]
            self._patterns[column] = [pattern for patterns, _ in forms for pattern in patterns]
            if not texts:
                self.empty.append(column)
            if any(is_partial for _, is_partial in forms):
                self.not_searched.append(column)

    def columns_in(self, text: str) -> list[str]:
        """The columns of which a value stands in a text."""
        folded = _folded(_composed(text))
        return [
            column
            for column, patterns in self._patterns.items()
            if any(pattern.search(folded) for pattern in patterns)
        ]

    def masked(self, text: str) -> str:
        """The text with MASK for every occurrence of a value; searched again, it has none.

        A text without any stays as it is; one with some also loses signs that are not seen.
        """
        while spans := self._spans(composed := _composed(text)):
            parts, position = [], 0
            for start, end in spans:
                parts += [composed[position:start], MASK]
                position = end
            text = "".join([*parts, composed[position:]])
        return text

    def _spans(self, text: str) -> list[tuple[int, int]]:
        """Where values stand, overlapping ones joined, in the order of the text."""
        folded = _folded(text)
        found = sorted(
            match.span()
            for patterns in self._patterns.values()
            for pattern in patterns
            for match in pattern.finditer(folded)
        )
        joined: list[tuple[int, int]] = []
        for start, end in found:
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
            else:
                joined.append((start, end))
        return joined


def _texts(cell: Any) -> Iterator[str]:
    """The texts of a cell, which may be a list or an object of JSON or Parquet."""
    if isinstance(cell, dict):
        cell = list(cell.values())
    if isinstance(cell, list | tuple):
        for part in cell:
            yield from _texts(part)
    elif text := text_of(cell):
        yield re.sub(r"(?<=^[0-9])([0-9]*)\.0+$", r"\1", text)  # a number that pandas wrote


@lru_cache(maxsize=4096)
def _forms(value: str) -> tuple[list[re.Pattern[str]], bool]:
    """Patterns of a value's ways of writing, and whether a part of it is not searched for."""
    value = _folded(_composed(value))
    if len(value) > MAX_VALUE:
        return [], True
    patterns = [_date_pattern(*date) for date in _dates(value)]
    words = re.findall(rf"[^\W\d_]+(?:[{_DASH}'\u2019][^\W\d_]+)*", value)
    has_digits = re.search("[0-9]", value) is not None
    is_date = bool(patterns) and not any(word != "T" for word in words)
    if has_digits and (not is_date or value.isdigit()):
        patterns += _code_patterns(value)
    is_partial = not patterns
    if not has_digits or "^" in value or sum(len(word) >= MIN_LETTERS for word in words) > 1:
        names, is_partial = _name_patterns(words)
        patterns += names
    return [re.compile(pattern, re.IGNORECASE) for pattern in patterns], is_partial


def _dates(value: str) -> Iterator[tuple[int, int, int]]:
    """Year, month and day of each reading of each date in a value."""
    matches = [match for way in _DATES for match in way.finditer(value)]
    found = dict.fromkeys((int(m["y"]), int(m["m"]), int(m["d"])) for m in matches)
    for year, month, day in found:
        if 1800 <= year < 2200 and 1 <= month <= 12 and 1 <= day <= 31:
            yield year, month, day


def _date_pattern(year: int, month: int, day: int) -> str:
    months, days = (str(n) if n > 9 else f"0?{n}" for n in (month, day))
    years = f"(?:{year}|{year % 100:02})"
    return (
        rf"(?<![0-9])(?:{year}{month:02}{day:02}(?={_TIME}(?![0-9])|(?![0-9]))|(?:"
        rf"{year}[{_DASH}]{months}[{_DASH}]{days}"
        rf"|{days}\.\s?{months}\.\s?{years}"
        rf"|{days}/{months}/{years}|{months}/{days}/{years})(?![0-9]))"
    )


def _code_patterns(value: str) -> list[str]:
    """A number or code with any separators between its parts, or none; empty if it is too short."""
    chunks = re.findall(r"[^\W\d_]+|[0-9]+", value)
    code = "".join(chunks)
    if len(code) < (MIN_DIGITS if code.isdigit() else MIN_CHARACTERS):
        return []
    if len(code) >= _LONG_CODE:
        chunks = list(code)
    spaced = f"{_SEPARATOR}{{0,2}}".join(map(_letters, chunks))
    before, after = ("[0-9]" if sign.isdigit() else r"[^\W\d_]" for sign in (code[0], code[-1]))
    as_is = _letters(re.sub(r"^[\W_]+|[\W_]+$", "", value))
    return [f"(?<!{before})(?:{spaced}|{as_is})(?!{after})"]


def _name_patterns(words: list[str]) -> tuple[list[str], bool]:
    """A pattern of a name's parts, and whether a part is not searched for on its own.

    Args:
        words: may have hyphens and apostrophes inside.
    """
    parts = [part for word in words for part in _parts_of(word)]
    own = [part for part in parts if _is_searched(part)]
    if not own:
        both = len(parts) == 2 and sum(map(len, parts)) > MIN_LETTERS
        orders = [_JOINT.join(map(_letters, order)) for order in (parts, parts[::-1])]
        return [f"{_START}(?:{'|'.join(orders)}){_END}"] if both else [], True
    compounds = [_parts_of(word) for word in words if not word.isalpha()]
    compounds += [own[:2], own[1::-1]] if len(own) > 1 else []  # as in a file name
    joined = [f"[{_DASH}'\u2019\\s]?".join(map(_letters, compound)) for compound in compounds]
    core = "|".join([*joined, *map(_letters, own)])
    other = "|".join(map(_letters, parts))
    beside = f"(?:{other}){_END}{_JOINT}", f"{_JOINT}(?:{other}){_END}"
    pattern = f"{_START}(?:{beside[0]}){{0,4}}(?:{core}){_END}(?:{beside[1]}){{0,4}}"
    return [pattern], len(own) < len(parts)


def _parts_of(word: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", word)


def _is_searched(part: str) -> bool:
    is_long = len(part) >= MIN_LETTERS and max(part) < _FIRST_WITHOUT_SPACES
    return is_long and not _PARTICLES.fullmatch(part)


def _letters(word: str) -> str:
    """A pattern of a folded word, whichever way its umlauts are written."""
    pieces = re.findall(f"{'|'.join(_DIGRAPHS)}|.", word.lower(), re.DOTALL)
    pairs = ((_UMLAUTS.get(piece, piece), piece) for piece in pieces)
    return "".join(
        f"(?:{pair}|{_DIGRAPHS[pair]})" if pair in _DIGRAPHS else re.escape(piece)
        for pair, piece in pairs
    )


def _composed(text: str) -> str:
    """The text in composed form, without soft hyphens and other signs that are not seen."""
    if text.isascii():
        return text
    return _INVISIBLE.sub("", unicodedata.normalize("NFC", text))


def _folded(text: str) -> str:
    """The text without accents, but with its umlauts; of the same length."""
    return text if text.isascii() else text.translate(_plain_letters())


@lru_cache(maxsize=1)
def _plain_letters() -> dict[int, str]:
    """The letter without accent for each Latin letter that has one and is no umlaut."""
    table = {ord(sign): plain for sign, plain in _OTHERS.items()}
    table |= {
        ord(sign.upper()): plain.upper() for sign, plain in _OTHERS.items() if sign != "\u0131"
    }
    for code in [*range(0xC0, 0x250), *range(0x1E00, 0x1F00)]:
        parts = unicodedata.normalize("NFD", chr(code))
        umlaut = unicodedata.normalize("NFC", parts[:2])
        if umlaut.lower() in _UMLAUTS:
            table[code] = umlaut
        elif parts[0].isascii():
            table[code] = parts[0]
    return table
