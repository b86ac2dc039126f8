"""Finding F1: what counts, what is left out, and that one word which turns the meaning is seen."""

from dataclasses import replace

import numpy as np
import pytest

from medft.demo.phantoms import MODALITIES, draw_phantom, report
from medft.metrics.bootstrap import difference, estimate
from medft.metrics.findings import finding_f1, read_share
from medft.metrics.lexicon import load_lexicon
from medft.metrics.text import bleu


@pytest.fixture(scope="module")
def lexicon():
    return load_lexicon()


def value(scorer):
    return scorer.score(np.ones(len(scorer.rows)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            "There is no pleural effusion in the right hemithorax on this frontal chest view.",
            "There is a pleural effusion in the right hemithorax on this frontal chest view.",
        ),
        (
            "Small pleural effusion at the base of the left lung, unchanged from the last study.",
            "Small pleural effusion at the base of the right lung, unchanged from the last study.",
        ),
    ],
)
def test_a_word_that_turns_the_meaning_round_is_seen_here_and_not_by_bleu(one, other, lexicon):
    assert value(bleu([one], [other])) > 75
    assert value(finding_f1([one], [other], lexicon)) == 0
    assert value(finding_f1([one], [one], lexicon)) == 1


def test_f1_by_hand(lexicon):
    predictions = ["Left effusion and mass.", "Normal.", "No nodule.", None]
    references = ["Left effusion.", "Normal.", "Nodule.", "Normal."]
    # tp: effusion, no finding; fp: mass, no finding, the None; fn: nodule, no finding
    scorer = finding_f1(predictions, references, lexicon)
    assert value(scorer) == pytest.approx(2 * 2 / (2 * 2 + 3 + 2))
    assert scorer.n == 4


@pytest.mark.parametrize("failed", [None, "", " \n ", "The cat sat on the mat.", "Kein Erguss."])
def test_answers_that_are_not_read_are_wrong_and_no_better_than_a_wrong_finding(failed, lexicon):
    assert value(finding_f1([failed], ["Normal."], lexicon)) == 0
    some = value(finding_f1([failed, "Mass"], ["Nodule", "Mass"], lexicon))
    assert some == value(finding_f1(["Normal.", "Mass"], ["Nodule", "Mass"], lexicon)) == 0.5
    assert value(finding_f1(["Clear."], ["Normal."], lexicon)) == 1


def test_rows_are_left_out_for_their_reference_alone(lexicon):
    references = ["Mass", "The cat sat on the mat.", "Normal.", "Nodule", "Bonjour", "Cyst"]
    groups = list("abcdef")
    one = finding_f1(references, references, lexicon)
    other = finding_f1([None, "Mass", "Mass", "?", "Nodule", "Cyst"], references, lexicon)
    assert one.rows.tolist() == other.rows.tolist() == [True, False, True, True, False, True]
    assert (value(one), value(other)) == (1, 0.25)
    assert value(finding_f1(references[:1] + ["Mass"] * 5, references, lexicon)) == 0.25
    paired = estimate(difference(one, other), groups)
    assert (paired.value, paired.n, paired.groups) == (0.75, 4, 4)


GERMAN = [
    "Kein Pleuraerguss, kein Pneumothorax.",
    "Unauff\u00e4lliger Thorax.",
    "Verschattung im linken Unterlappen, passend zu Pneumonie.",
    "Herz normal gro\u00df, Lunge frei. Pneumothorax rechts.",
]


def test_texts_in_a_language_that_is_not_read_have_no_score(lexicon):
    found = estimate(finding_f1(GERMAN, GERMAN, lexicon), list("abcd"))
    assert (found.value, found.low, found.n) == (None, None, 0)
    assert found.reason == "the lexicon reads 0 of 4 references, fewer than 30%"
    assert read_share(GERMAN, lexicon) == 0
    mixed = GERMAN + ["Mass"] * 2  # 33 % of which are read
    assert value(finding_f1(mixed, mixed, lexicon)) == 1
    below = [*GERMAN, "?", "Mass", "Mass"]
    scorer = finding_f1(below, below, lexicon)
    assert (estimate(scorer, list("abcdefg")).value, scorer.n) == (None, 2)
    assert np.isnan(difference(scorer, scorer).score(np.ones(7)))
    assert read_share([*GERMAN, None, "Mass"], lexicon) == pytest.approx(1 / 6)


@pytest.mark.parametrize("clear", [0.25, 0.7])
def test_answers_rank_by_what_they_know_on_300_drawn_reports(clear, lexicon):
    """Nonsense was once as good as a normal report and better than the nearest training text."""
    random = np.random.default_rng(7)
    names = [list(MODALITIES)[index % 4] for index in range(300)]
    phantoms = [draw_phantom(name, random, clear=clear) for name in names]
    references = [report(phantom, random) for phantom in phantoms]
    swapped = {"left": "right", "right": "left"}
    answers = {
        "true": [report(phantom, random) for phantom in phantoms],  # in one of two wordings
        "wrong side": [report(replace(p, side=swapped[p.side]), random) for p in phantoms],
        "copied": [report(draw_phantom(name, random, clear=clear), random) for name in names],
        "normal": [MODALITIES[name].clear[0] for name in names],
        "sentence": ["The cat sat on the mat."] * 300,
        "random words": [" ".join(random.choice(["river", "no", "the", "of"], 9)) for _ in names],
        "empty": [None, ""] * 150,
    }
    scorers = {name: finding_f1(texts, references, lexicon) for name, texts in answers.items()}
    assert all(scorer.n == 300 for scorer in scorers.values())
    f1 = {name: value(scorer) for name, scorer in scorers.items()}
    assert f1["sentence"] == f1["random words"] == f1["empty"] == 0
    normal = sum(phantom.look is None for phantom in phantoms) / 300
    assert f1["normal"] == f1["wrong side"] == pytest.approx(normal)
    assert 0.05 < f1["copied"] < f1["true"] == 1
    groups = [f"p{index // 2}" for index in range(300)]
    for known in ("copied", "normal", "wrong side", "true"):
        for nonsense in ("sentence", "random words", "empty"):
            better = estimate(difference(scorers[nonsense], scorers[known]), groups)
            assert better.high < 0
