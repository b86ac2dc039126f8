"""One word for one thing: words and names that were given up do not come back."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENDINGS = (".py", ".md", ".yaml", ".sbatch")
LEXICON = ROOT / "medft" / "metrics" / "lexicon.yaml"
"""Words of radiologists, whatever they are."""

WORDS = re.compile(
    r"\b(pictures?|torn|learnt|licences?|colou?red|colours?)\b(?<!colored)", re.IGNORECASE
)

NAMES = re.compile(
    r"(?<![A-Za-z])(write_notes|read_notes|NOTES_FILE|EpochTeller|GradientWitness|NumberGuard|SigtermStopper"
    r"|HistoryWriter|CheckpointKeeper|BestModelKeeper|MeasuredBatches|Findings\(|Share\(|share_out"
    r"|by_images|by_texts|by_scale|by_bias|random_numbers_again|first_pass|head_rows|never_labels"
    r"|mixes_rows|separates?_rows|take_pictures|shipped\(|process_set_up"
    r"|find_trained|decoder_lines|encoder_lines|RoundSampler|round_size)"
    r"|\bprepare_inputs\b"  # Trainer has a _prepare_inputs
)


def wrong_words(text: str) -> list[str]:
    found = [f"{word[0]} as a word" for word in WORDS.finditer(text)]
    return found + [name[0] for name in NAMES.finditer(text)]


def texts() -> list[Path]:
    folders = [ROOT / name for name in ("medft", "recipes", "docs")]
    found = [path for folder in folders for path in folder.rglob("*") if path.suffix in ENDINGS]
    return [ROOT / "README.md", *(path for path in sorted(found) if path != LEXICON)]


def test_no_text_has_a_word_that_was_given_up():
    found = texts()
    assert len(found) > 100
    wrong = {
        path.relative_to(ROOT).as_posix(): words
        for path in found
        if (words := wrong_words(path.read_text(encoding="utf-8")))
    }
    assert not wrong


@pytest.mark.parametrize(
    "text",
    [
        "the picture", "Pictures of", "a torn file", "what it learnt", "the licence", "Colour",
        "class NumberGuard(TrainerCallback):", "self._first_pass()", "by_images=found",
    ],
)  # fmt: skip
def test_a_planted_word_is_found(text):
    assert wrong_words(text)


def test_words_that_look_alike_are_free():
    assert not wrong_words("a colored image, a license, Findings that are named, `_prepare_inputs`")
