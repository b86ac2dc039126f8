"""Findings that a report asserts, by keyword matching: "finding F1 (keywords)".

Only phrases of lexicon.yaml are detected; a text with none of them counts as one without a finding.
Not detected: whether a finding is true of the image, how large or severe or certain it is, where
it lies beyond left and right, whether it is old or new, what a pronoun refers to, spelling
mistakes, or another language. The metric separates two texts that BLEU does not, and it is not a
measure of medical accuracy.

Pure functions, except for reading the lexicon.

Shape letters in this file:
    N  pairs of a prediction and a reference
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from medft.config.strict_yaml import Section, StrictYaml, errors_of, nearest
from medft.errors import RecipeError
from medft.metrics.bootstrap import Scorer, ratio

NO_FINDING = "no finding"
"""Item of a text that asserts no finding of the lexicon."""

_SHIPPED = Path(__file__).parent / "lexicon.yaml"

_TOKEN = re.compile(r"[^\W_]+|,|[.!?](?!\w)|;|\n\s*\n")
_WORD = re.compile(r"[^\W_]+")

_DIVIDERS = ("comma", "with", "before", "not", "ends")
"""Values of _Piece.kind that separate a side from a finding; "and" and "or" separate less."""

Phrases = Annotated[list[Annotated[str, Field(pattern=r"[A-Za-z0-9]")]], Field(min_length=1)]
"""Words or phrases, each with a letter or a digit."""


class SidesSection(Section):
    """Words for sides."""

    left: Phrases
    right: Phrases

    both: Phrases
    """Mean left and right."""


class CuesSection(Section):
    """Words that decide whether a finding is asserted."""

    before: Phrases
    """Negate what follows."""

    not_: Phrases = Field(alias="not")
    """Negate what follows; past a comma only if they negated a finding before it."""

    after: Phrases
    """Negate what precedes."""

    ignored: Phrases
    """Have no effect, although a part of them would."""

    ends: Phrases
    """End the scope of a preceding negation, and separate sides from findings."""

    affirms: Phrases
    """End the scope of a preceding negation."""

    and_: Phrases = Field(alias="and")
    or_: Phrases = Field(alias="or")
    with_: Phrases = Field(alias="with")

    openers: list[Annotated[str, Field(pattern=r"^[a-z]+$")]]
    """Begin a new statement after a comma or an "and"."""


class LexiconFile(Section):
    """The content of a lexicon file."""

    findings: Annotated[dict[str, Phrases], Field(min_length=1)]
    """Phrases by name of the finding."""

    sides: SidesSection
    cues: CuesSection


class _Piece(NamedTuple):
    """A phrase of the lexicon found in a text, a comma, or another word."""

    kind: str
    """finding, side, the name of a cue list, comma, or word."""

    name: str
    """Name of the finding or side; else empty."""

    first: str
    """Its first word."""


@dataclass(frozen=True)
class Lexicon:
    """A lexicon, indexed for lookup."""

    phrases: dict[tuple[str, ...], tuple[str, str]]
    """(kind, name) by the words of a phrase."""

    openers: frozenset[str]

    longest: int
    """Number of words in the longest phrase."""


def load_lexicon(path: Path | None = None) -> Lexicon:
    """The lexicon of a file; without a path, the packaged one.

    Raises:
        RecipeError: the file is missing or malformed, or a phrase has two meanings.
    """
    source = StrictYaml.read(path or _SHIPPED)
    problems = source.describe(errors_of(lambda: LexiconFile.model_validate(source.raw)), _explain)
    if problems:
        raise RecipeError(*problems)
    file = LexiconFile.model_validate(source.raw)
    phrases: dict[tuple[str, ...], tuple[str, str]] = {}
    for meaning, listed in _meanings(file):
        for phrase in listed:
            known = phrases.setdefault(_phrase(phrase), meaning)
            if known != meaning:
                raise RecipeError(
                    f"{source.path}: expected one meaning of {phrase!r}, got {' '.join(known)} and "
                    f"{' '.join(meaning)}: keep one"
                )
    for name, listed in file.findings.items():
        for *words, last in map(_phrase, listed):
            for ending in ("s", "es"):
                phrases.setdefault((*words, last + ending), ("finding", name))
    return Lexicon(phrases, frozenset(file.cues.openers), max(map(len, phrases)))


def mentions(text: str | None, lexicon: Lexicon) -> frozenset[tuple[str, str]]:
    """The findings that a text asserts, each as (finding, side); side is left, right or empty.

    Negation, within a sentence:

    - A cue such as "no" negates the findings that follow it, up to a word such as "but" or
      "is seen". Its scope also ends at a comma or an "and" directly before a side or an opener
      ("small", "the"), unless an "or" follows: so "no left effusion, right pneumothorax" asserts
      the second, and "no effusion, large mass, or fracture" nothing. The scope of a cue such as
      "not" also ends at a comma before which it negated nothing.
    - A cue such as "is not seen" negates the finding before it, if no comma, "and" or "but" is
      between, and those listed with it.

    A side belongs to the nearest finding of its sentence, negated or not. Nearest is the one with
    the fewest dividers between (commas, "and", "or", "with", negations, words such as "but"), then
    with the fewest words, then the one that follows. A side across more dividers other than "and"
    and "or" than another side of that finding is dropped. A finding named both with and
    without a side counts with it.

    Findings stated as possible count as asserted.

    Returns:
        {("no finding", "")} for a text that asserts none; an empty set for None or a blank text.

    Source: the rules are ours; cues before and after as in Chapman et al., NegEx, 2001; "no
    finding" as a class as in Smit et al., CheXbert, 2020 (arXiv:2004.09167).
    """
    if text is None or not text.strip():
        return frozenset()
    asserted = set()
    for sentence in _sentences(text, lexicon):
        negated = _negated_before(sentence, lexicon) | _negated_after(sentence, lexicon)
        for place, sides in _sides(sentence).items():
            if place not in negated:
                asserted |= {(sentence[place].name, side) for side in sides or {""}}
    sided = {finding for finding, side in asserted if side}
    kept = {(finding, side) for finding, side in asserted if side or finding not in sided}
    return frozenset(kept or {(NO_FINDING, "")})


def finding_f1(
    predictions: Sequence[str | None], references: Sequence[str], lexicon: Lexicon
) -> Scorer:
    """Micro F1 of the (finding, side) items that predictions and references assert, in [0, 1].

    All items count equally, "no finding" included; the right finding on the wrong side is wrong.
    Report it as "finding F1 (keywords)".

    Source: 2 tp / (2 tp + fp + fn) over the items of `mentions`.
    """
    pairs = [
        (mentions(text, lexicon), mentions(reference, lexicon))
        for text, reference in zip(predictions, references, strict=True)
    ]
    shared = np.array([2 * len(got & expected) for got, expected in pairs])
    named = np.array([len(got) + len(expected) for got, expected in pairs])
    return ratio(shared, named, np.ones(len(pairs), dtype=bool), "no text names a finding")


def _explain(error: dict[str, Any]) -> str | None:
    if error["type"] != "extra_forbidden":
        return None
    *inner, key = error["loc"]
    known = {"sides": ["left", "right", "both"], "cues": _cue_names()}
    names = known[inner[0]] if inner else LexiconFile.model_fields
    return f"unknown key {'.'.join(map(str, error['loc']))}: {nearest(str(key), names)}"


def _cue_names() -> list[str]:
    return [field.alias or name for name, field in CuesSection.model_fields.items()]


def _meanings(file: LexiconFile) -> Iterator[tuple[tuple[str, str], list[str]]]:
    """Each (kind, name) with its phrases."""
    for name, phrases in file.findings.items():
        yield ("finding", name), phrases
    for name, phrases in file.sides.model_dump().items():
        yield ("side", name), phrases
    for kind, phrases in file.cues.model_dump(by_alias=True, exclude={"openers"}).items():
        yield (kind, ""), phrases


def _phrase(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.casefold()))


def _sentences(text: str, lexicon: Lexicon) -> Iterator[list[_Piece]]:
    """The pieces of each sentence; at each word the longest phrase is matched."""
    tokens = _TOKEN.findall(text.casefold())
    sentence: list[_Piece] = []
    place = 0
    while place < len(tokens):
        first = tokens[place]
        if first[0].isalnum():
            length, (kind, name) = _longest(tokens[place : place + lexicon.longest], lexicon)
            sentence.append(_Piece(kind, name, first))
            place += length
            continue
        if first == ",":
            sentence.append(_Piece("comma", "", first))
        else:
            yield sentence
            sentence = []
        place += 1
    yield sentence


def _longest(tokens: list[str], lexicon: Lexicon) -> tuple[int, tuple[str, str]]:
    """Number of leading tokens that form the longest phrase, and its (kind, name)."""
    for length in range(len(tokens), 0, -1):
        meaning = lexicon.phrases.get(tuple(tokens[:length]))
        if meaning:
            return length, meaning
    return 1, ("word", "")


def _negated_before(sentence: list[_Piece], lexicon: Lexicon) -> set[int]:
    """Indices of the findings that a preceding cue negates."""
    found: set[int] = set()
    negates = passes_comma = False
    for place, piece in enumerate(sentence):
        if piece.kind in ("before", "not"):
            negates, passes_comma = True, piece.kind == "before"
        elif piece.kind in ("ends", "affirms"):
            negates = False
        elif piece.kind in ("comma", "and"):
            passes = passes_comma or piece.kind == "and"
            negates = negates and passes and _list_goes_on(sentence[place + 1 :], lexicon)
        elif piece.kind == "finding" and negates:
            found.add(place)
            passes_comma = True
    return found


def _list_goes_on(rest: list[_Piece], lexicon: Lexicon) -> bool:
    """Whether the pieces after a comma or an "and" continue the list before it."""
    for piece in rest:
        if piece.kind == "ends":
            break
        if piece.kind == "or":
            return True
    return not rest or not (rest[0].kind == "side" or rest[0].first in lexicon.openers)


def _negated_after(sentence: list[_Piece], lexicon: Lexicon) -> set[int]:
    """Indices of the findings that a following cue negates."""
    found: set[int] = set()
    for cue in (place for place, piece in enumerate(sentence) if piece.kind == "after"):
        listed = False
        for place in range(cue - 1, -1, -1):
            piece = sentence[place]
            if piece.kind == "finding":
                found.add(place)
                listed = True
            elif listed:
                if piece.kind not in ("comma", "and", "or", "side") and (
                    piece.first not in lexicon.openers
                ):
                    break
            elif piece.kind in ("comma", "and", "ends"):
                break
    return found


def _sides(sentence: list[_Piece]) -> dict[int, set[str]]:
    """Sides of each finding, by index of the finding."""
    dividers = np.cumsum([piece.kind in _DIVIDERS for piece in sentence])
    joints = dividers + np.cumsum([piece.kind in ("and", "or") for piece in sentence])
    findings = [place for place, piece in enumerate(sentence) if piece.kind == "finding"]
    reached: dict[int, list[tuple[int, str]]] = {place: [] for place in findings}
    for place, piece in enumerate(sentence):
        if piece.kind == "side" and findings:
            finding = min(
                findings,
                key=lambda other: (abs(joints[other] - joints[place]), abs(other - place), -other),
            )
            crossed = abs(int(dividers[finding] - dividers[place]))
            reached[finding].append((crossed, piece.name))
    sides = {}
    for place, found in reached.items():
        least = min((crossed for crossed, _ in found), default=0)
        names = {name for crossed, name in found if crossed == least}
        sides[place] = names - {"both"} | ({"left", "right"} if "both" in names else set())
    return sides
