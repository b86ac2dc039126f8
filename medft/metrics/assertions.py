"""What a text asserts of the findings of a lexicon.

Pure functions. Not read: whether a finding is true of the image, how large or severe or certain it
is, where it lies beyond left and right, whether it is old or new, what a pronoun refers to,
spelling mistakes, or another language.
"""

from functools import lru_cache

from medft.metrics.lexicon import Lexicon
from medft.metrics.pieces import CLAIMS, Piece, pieces_of, sentences_of
from medft.metrics.sides import sides_of

NO_FINDING = "no finding"
"""Item of a text that asserts that there is none."""


@lru_cache(maxsize=2**16)
def mentions(text: str | None, lexicon: Lexicon) -> frozenset[tuple[str, str]]:
    """The findings that a text asserts, each as (finding, side); side is left, right or empty.

    A text that asserts no finding gives {("no finding", "")} only if it says so: it calls something
    normal ("the lungs are clear", "within normal limits"), or negates a finding or abnormality
    ("no effusion", "no acute disease"). A text that does neither is not read.

    Negation, within a sentence:

    - A cue such as "no" negates the findings that follow it, up to a word such as "but" or
      "is seen". Its scope also ends at a comma or an "and" directly before a side or an opener
      ("small", "the"), unless an "or" follows: so "no left effusion, right pneumothorax" asserts
      the second, and "no effusion, large mass, or fracture" nothing. The scope of a cue such as
      "not" also ends at a comma before which it negated nothing.
    - A cue such as "is not seen" negates the finding before it, if no comma, "and" or "but" is
      between, and those listed with it. A cue such as "resolved" does either.
    - An answer ("cardiomegaly: no") negates or asserts what stands before it in the sentence.
    - A finding before a colon that is named again behind it ("fracture: no acute fracture") is
      negated if it is negated there.

    Not stated is what follows a cue such as "history of" or "evaluate for", as far as a negation
    would reach or up to "with", and a question or a heading such as "indication:" altogether.

    A side belongs to the nearest finding of its sentence, negated or not. Nearest is the one with
    the fewest dividers between (commas, "and", "or", "with", negations, words such as "but"), then
    with the fewest words, then the one that follows. A side across more dividers other than "and"
    and "or" than another side of that finding is dropped. A finding without a side takes that of
    the finding before it across "with", "and", or a link such as "consistent with", and that of the
    next in "scar or nodule on the left". A finding named both with and without a side counts with
    it.

    Findings stated as possible count as asserted.

    Returns:
        an empty set for a text that is not read: None, blank, without a word of the lexicon, in
        another language or script, or without an assertion.

    Source: the rules are ours; cues before and after as in Chapman et al., NegEx, 2001; "no
    finding" as a class as in Smit et al., CheXbert, 2020 (arXiv:2004.09167).
    """
    pieces = pieces_of(text or "", lexicon)
    if any(piece.kind == "foreign" for piece in pieces):
        return frozenset()
    asserted, denied = set(), False
    for sentence in sentences_of(pieces, lexicon):
        states = _states(sentence, lexicon)
        denied |= any(
            state == (sentence[place].kind == "normal") for place, state in states.items()
        )
        for place, sides in sides_of(sentence, lexicon).items():
            if states.get(place):
                asserted |= {(sentence[place].name, side) for side in sides or {""}}
    sided = {finding for finding, side in asserted if side}
    kept = {(finding, side) for finding, side in asserted if side or finding not in sided}
    return frozenset(kept or ({(NO_FINDING, "")} if denied else ()))


def _states(sentence: list[Piece], lexicon: Lexicon) -> dict[int, bool]:
    """By index of a claim: whether it is asserted, else it is negated; absent if not stated."""
    negated = _before(sentence, lexicon, aside=False) | _after(sentence, lexicon, "after")
    aside = _before(sentence, lexicon, aside=True) | _after(sentence, lexicon, "aside_after")
    asked = _asked(sentence)
    states = {}
    for place, piece in enumerate(sentence):
        if piece.kind in CLAIMS and place not in aside:
            answers = {p.name for p in sentence[place:] if p.kind == "answer"} if asked else {"yes"}
            if len(answers) == 1:
                states[place] = "yes" in answers and place not in negated
    for place in [place for place in states if _is_denied_label(sentence, place, states)]:
        states[place] = False
    return states


def _is_denied_label(sentence: list[Piece], label: int, states: dict[int, bool]) -> bool:
    """Whether a finding before a colon is named again behind it, and negated there alone."""
    after = sentence[label + 1 :]
    if sentence[label].kind != "finding" or not after or after[0].kind != "colon":
        return False
    again = [
        states.get(place, True)
        for place, piece in enumerate(sentence)
        if place > label and piece.kind == "finding" and sentence[label].name.endswith(piece.name)
    ]
    return bool(again) and not any(again)


def _asked(sentence: list[Piece]) -> bool:
    """Whether a sentence is a question."""
    marks = [piece.first for piece in sentence if piece.kind == "stop"]
    return "?" in marks or any(piece.kind == "questions" for piece in sentence[:1])


def _before(sentence: list[Piece], lexicon: Lexicon, *, aside: bool) -> set[int]:
    """Indices of the claims that a preceding cue negates, or else leaves unstated."""
    begins = ("aside",) if aside else ("before", "not", "either")
    ends = ("with", "before", "not", "affirms", "ends") if aside else ("affirms", "ends")
    found: set[int] = set()
    active = passes_comma = crossed = heading = False
    for place, piece in enumerate(sentence):
        after = sentence[place + 1 : place + 2]
        is_followed = bool(after) and after[0].kind not in ("comma", "colon")
        if piece.kind == "headings":
            heading |= aside and bool(after) and after[0].kind == "colon"
        elif piece.kind in begins:
            if piece.kind != "either" or not _follows_claim(sentence[:place]):
                active, passes_comma, crossed = is_followed, piece.kind != "not", False
        elif piece.kind in ends:
            active = False
        elif piece.kind in ("comma", "and"):
            passes = passes_comma or piece.kind == "and"
            active = active and passes and _list_goes_on(sentence[place + 1 :], lexicon)
            crossed |= piece.kind == "comma"
        elif piece.kind in CLAIMS:
            active = active and not (crossed and piece.kind == "normal")
            if active or heading:
                found.add(place)
                passes_comma = True
    return found


def _follows_claim(clause: list[Piece]) -> bool:
    """Whether a cue at the end of these pieces stands behind a claim, in one clause with it."""
    for piece in reversed(clause):
        if piece.kind in ("comma", "and", "ends"):
            return False
        if piece.kind in CLAIMS:
            return True
    return False


def _list_goes_on(rest: list[Piece], lexicon: Lexicon) -> bool:
    """Whether the pieces after a comma or an "and" continue the list before it."""
    for piece in rest:
        if piece.kind == "ends":
            break
        if piece.kind == "or":
            return True
    return not rest or not (rest[0].kind == "side" or rest[0].first in lexicon.words.openers)


def _after(sentence: list[Piece], lexicon: Lexicon, kind: str) -> set[int]:
    """Indices of the claims that a following cue of a kind negates, or leaves unstated."""
    found: set[int] = set()
    for cue, piece in enumerate(sentence):
        is_no = piece.kind == "answer" and piece.name == "no" and not _asked(sentence)
        if piece.kind == kind or (kind == "after" and (is_no or piece.kind == "either")):
            mark = piece.kind == "answer"  # the one before it: "effusion - none"
            found |= _listed_before(sentence[: cue - mark], lexicon)
    return found


def _listed_before(pieces: list[Piece], lexicon: Lexicon) -> set[int]:
    """Indices of the claim at the end of the pieces, in their clause, and of those in its list."""
    found: set[int] = set()
    joined = False
    for place in range(len(pieces) - 1, -1, -1):
        piece = pieces[place]
        if piece.kind in ("finding", "abnormality"):
            found.add(place)
        elif not found:
            if piece.kind in ("comma", "and", "ends", "normal"):
                break
        elif piece.kind in ("and", "or"):
            joined = True
        elif not (
            piece.kind == "side"
            or (piece.kind == "comma" and joined)
            or piece.first in lexicon.words.openers
        ):
            break
    return found
