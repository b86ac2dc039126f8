"""The side of each finding of a sentence: left, right, both or none."""

from itertools import accumulate, pairwise

from medft.metrics.lexicon import Lexicon
from medft.metrics.pieces import Piece

_DIVIDERS = ("comma", "with", "before", "not", "ends")
"""Kinds of pieces that separate a side from a finding; "and" and "or" separate less."""

_SEPARATE = ("before", "not", "after", "either", "ends", "stop", "colon", "normal", "aside")
"""Kinds of pieces across which no finding takes the side of another."""


def sides_of(sentence: list[Piece], lexicon: Lexicon) -> dict[int, set[str]]:
    """Sides of each finding, by index of the finding."""
    named = _pieces_that_name_a_side(sentence)
    findings = [place for place in named if sentence[place].kind == "finding"]
    takes = {
        place
        for place in findings
        if not named[place] and sentence[place].name not in lexicon.unsided
    }
    for one, other in pairwise(findings):
        between = sentence[one + 1 : other]
        if other in takes and _joined(between, lexicon, ("with", "and", "or", "links")):
            named[other] = named[one]
    for other, one in pairwise(reversed(findings)):
        is_after = bool(named[other]) and max(named[other]) > other
        between = sentence[one + 1 : other]
        if (
            one in takes
            and not named[one]
            and is_after
            and _joined(between, lexicon, ("and", "or"))
        ):
            named[one] = named[other]
    sides = {}
    for finding in findings:
        names = {sentence[place].name for place in named[finding]}
        sides[finding] = names - {"both"} | ({"left", "right"} if "both" in names else set())
    return sides


def _pieces_that_name_a_side(sentence: list[Piece]) -> dict[int, list[int]]:
    """Indices of the sides that belong to each finding and to each word such as "clear"."""
    dividers = list(accumulate(piece.kind in _DIVIDERS for piece in sentence))
    joints = list(accumulate(piece.kind in (*_DIVIDERS, "and", "or") for piece in sentence))
    claims = [place for place, piece in enumerate(sentence) if piece.kind in ("finding", "normal")]
    reached: dict[int, list[tuple[int, int]]] = {place: [] for place in claims}
    for place, piece in enumerate(sentence):
        if piece.kind == "side" and claims:
            claim = min(
                claims,
                key=lambda other: (abs(joints[other] - joints[place]), abs(other - place), -other),
            )
            reached[claim].append((abs(dividers[claim] - dividers[place]), place))
    named = {}
    for claim, found in reached.items():
        least = min((crossed for crossed, _ in found), default=0)
        named[claim] = [place for crossed, place in found if crossed == least]
    return named


def _joined(between: list[Piece], lexicon: Lexicon, by: tuple[str, ...]) -> bool:
    """Whether the pieces between two findings place both at one side."""
    kinds = {piece.kind for piece in between}
    if kinds & set(_SEPARATE) or (kinds and not kinds & set(by)):
        return False
    if "links" in kinds and "links" in by:
        return True
    begins_anew = any(
        piece.kind == "and" and after.first in lexicon.words.openers
        for piece, after in pairwise(between)
    )
    return "comma" not in kinds and not begins_anew
