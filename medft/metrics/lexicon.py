"""The words by which texts are read: lexicon.yaml, indexed by phrase."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from medft.config.strict_yaml import Section, StrictYaml, errors_of, nearest
from medft.errors import RecipeError

_SHIPPED = Path(__file__).parent / "lexicon.yaml"

_WORD = re.compile(r"[^\W_]+")

_SKIPPED = 6
"""Fillers within a phrase, at most."""

Phrases = Annotated[list[Annotated[str, Field(pattern=r"[A-Za-z0-9]")]], Field(min_length=1)]
"""Words or phrases, each with a letter or a digit."""

Words = list[Annotated[str, Field(pattern=r"^[a-z]+$")]]
"""Single words."""


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

    either: Phrases
    """Negate what precedes in their clause, else what follows."""

    aside: Phrases
    """What follows is history, a question or a matter of the study: not stated."""

    aside_after: Phrases
    """What precedes is not stated."""

    headings: Phrases
    """With a colon, begin a sentence that states nothing."""

    questions: Phrases
    """Begin a question where they begin a sentence."""

    links: Phrases
    """Join a finding to another at the same place."""

    ignored: Phrases
    """Have no effect, although a part of them would."""

    ends: Phrases
    """End the scope of a preceding negation, and separate sides from findings."""

    affirms: Phrases
    """End the scope of a preceding negation."""

    and_: Phrases = Field(alias="and")
    or_: Phrases = Field(alias="or")
    with_: Phrases = Field(alias="with")


class WordsSection(Section):
    """Single words that count by where they stand; each may have another meaning elsewhere."""

    openers: Words
    """Begin a new statement after a comma or an "and"."""

    sections: Words
    """Begin a new sentence before a colon."""

    positive: Words
    """Answer what precedes them: it is so."""

    negative: Words
    """Answer what precedes them: it is not so."""

    fillers: Words
    """May stand between the words of a phrase."""


class LexiconFile(Section):
    """The content of a lexicon file."""

    findings: Annotated[dict[str, Phrases], Field(min_length=1)]
    """Phrases by name of the finding."""

    unsided: list[str]
    """Names of findings that take no side from another finding."""

    normal: Phrases
    """Assert that what is looked at is as it should be."""

    abnormality: Phrases
    """Negated, assert that there is no finding; else they assert nothing."""

    sides: SidesSection
    cues: CuesSection
    words: WordsSection

    foreign: Phrases
    """Show that a text is in another language."""


@dataclass(frozen=True, eq=False)
class Lexicon:
    """A lexicon, indexed for lookup; it equals itself alone, so that it may be a key."""

    phrases: dict[tuple[str, ...], tuple[str, str]]
    """(kind, name) by the words of a phrase."""

    beginnings: frozenset[tuple[str, ...]]
    """What phrases begin with, phrases included."""

    unsided: frozenset[str]
    words: WordsSection
    fillers: frozenset[str]

    def longest(self, tokens: Sequence[str], start: int) -> tuple[int, tuple[str, str]]:
        """The longest phrase that begins at a token; a colon is a filler ("heart: enlarged").

        Returns:
            number of its tokens, fillers included, and its (kind, name); 1 and ("word", "") if
            no phrase begins there.
        """
        found: tuple[int, tuple[str, str]] = 1, ("word", "")
        words: tuple[str, ...] = ()
        for place in range(start, len(tokens)):
            if (*words, tokens[place]) in self.beginnings:
                words = (*words, tokens[place])
                if words in self.phrases:
                    found = place - start + 1, self.phrases[words]
            else:
                skipped = place - start - len(words)
                is_filler = tokens[place] in self.fillers or tokens[place] == ":"
                if not words or not is_filler or skipped == _SKIPPED:
                    break
        return found


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
    unknown = [name for name in file.unsided if name not in file.findings]
    if unknown:
        raise RecipeError(
            f"{source.path}: expected names of findings in unsided, got {unknown[0]!r}: "
            f"{nearest(unknown[0], list(file.findings))}"
        )
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
    beginnings = {phrase[:count] for phrase in phrases for count in range(1, len(phrase) + 1)}
    return Lexicon(
        phrases=phrases,
        beginnings=frozenset(beginnings),
        unsided=frozenset(file.unsided),
        words=file.words,
        fillers=frozenset(file.words.fillers),
    )


def _explain(error: dict[str, Any]) -> str | None:
    if error["type"] != "extra_forbidden":
        return None
    *inner, key = error["loc"]
    sections: dict[str, type[Section]] = {
        "sides": SidesSection,
        "cues": CuesSection,
        "words": WordsSection,
    }
    fields = (sections[inner[0]] if inner else LexiconFile).model_fields
    names = [field.alias or name for name, field in fields.items()]
    return f"unknown key {'.'.join(map(str, error['loc']))}: {nearest(str(key), names)}"


def _meanings(file: LexiconFile) -> Iterator[tuple[tuple[str, str], list[str]]]:
    """Each (kind, name) of a phrase, with its phrases."""
    for name, phrases in file.findings.items():
        yield ("finding", name), phrases
    for name, phrases in file.sides.model_dump().items():
        yield ("side", name), phrases
    for kind, phrases in file.cues.model_dump(by_alias=True).items():
        yield (kind, ""), phrases
    for kind in ("normal", "abnormality", "foreign"):
        yield (kind, ""), getattr(file, kind)


def _phrase(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.casefold()))
