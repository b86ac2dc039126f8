"""Lexicons: the packaged one, one of one's own, and malformed ones."""

import re

import pytest

from medft.errors import RecipeError
from medft.metrics.assertions import NO_FINDING, mentions
from medft.metrics.lexicon import load_lexicon

LEXICON = """\
findings:
  rust: [rust, red rust]
unsided: [rust]
normal: [painted]
abnormality: [damage]
foreign: [rost]
sides: {left: [port], right: [starboard], both: [amidships]}
cues:
  before: ["no"]
  not: [not]
  after: [gone]
  either: [washed off]
  aside: [look for]
  aside_after: [sought]
  headings: [log]
  questions: [is there any]
  links: [because of]
  ignored: [rust red]
  ends: [but]
  affirms: [is there]
  and: [and]
  or: [or]
  with: [with]
words: {openers: [some], sections: [seen], positive: [aye], negative: [nay], fillers: [thick]}
"""


def test_a_lexicon_of_ones_own_is_used(tmp_path):
    path = tmp_path / "ship.yaml"
    path.write_text(LEXICON)
    own = load_lexicon(path)
    assert mentions("No rust, some red rust to port.", own) == {("rust", "left")}
    assert mentions("Rust amidships", own) == {("rust", "left"), ("rust", "right")}
    assert mentions("Rust red. Rust gone. Effusion.", own) == {(NO_FINDING, "")}
    assert mentions("Red thick rust.", own) == {("rust", "")}
    assert mentions("Look for rust: aye", own) == mentions("Painted. Rost.", own) == frozenset()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[rust, red rust]", "rust", r"ship.yaml:2: findings.rust: expected .*list, got 'rust'"),
        ("[rust, red rust]", "['...']", r"ship.yaml:2: findings.rust.0: expected"),
        ("  after: [gone]\n", "", r"ship.yaml:\d+: cues.after is required and missing: add it"),
        ("  after:", "  aftr:", r"unknown key cues.aftr: did you mean after"),
        ("port", "port, starboard", r"one meaning of 'starboard', got side left and side right"),
        ("[gone]", "[rust]", r"one meaning of 'rust', got finding rust and after"),
        ("[some]", "[some more]", r"ship.yaml:\d+: words.openers.0: expected"),
        (
            "unsided: [rust]",
            "unsided: [rusty]",
            r"findings in unsided, got 'rusty': did you mean rust",
        ),
        ("findings:", "findings", r"ship.yaml:\d+: expected YAML"),
    ],
)
def test_a_malformed_lexicon_is_refused(old, new, message, tmp_path):
    path = tmp_path / "ship.yaml"
    path.write_text(LEXICON.replace(old, new, 1))
    with pytest.raises(RecipeError) as caught:
        load_lexicon(path)
    assert any(re.search(message, problem) for problem in caught.value.problems), caught.value
    with pytest.raises(RecipeError, match="could not read it"):
        load_lexicon(tmp_path / "none.yaml")
