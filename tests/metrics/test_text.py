"""Text scores against the libraries called directly, and what must not count as equal."""

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from medft.metrics.bootstrap import estimate
from medft.metrics.text import (
    bleu,
    bleu_signature,
    closed_accuracy,
    exact_match,
    rouge_l,
    token_f1,
    words,
)

REFERENCES = [
    "Small right pleural effusion, unchanged from prior.",
    "No focal consolidation, effusion or pneumothorax.",
    "The nodule measures 3.5 cm.",
    "Heart size is normal.",
    "HER2+ tumour of the left breast.",
]
PREDICTIONS = [
    "Small left pleural effusion, unchanged.",
    "No focal consolidation, effusion or pneumothorax is seen.",
    "The nodule measures 35 cm .",
    None,
    "HER2- tumour of the left breast.",
]
METRICS = [exact_match, token_f1, bleu, rouge_l]


def value(scorer):
    return scorer.score(np.ones(len(scorer.rows)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Right effusion.", "right  EFFUSION"),
        ("3.5 cm.", "3.5 cm"),
        ("T2-weighted", "T2 weighted"),
        ("< 0.7", "<0.7"),
        (">= 0.7", "\u22650.7"),
        ("\u22120.7", "-0.7"),
        ("effusion - small", "effusion: (small)"),
        ("STRASSE", "stra\u00dfe"),
    ],
)
def test_texts_that_say_the_same(one, other):
    assert words(one) == words(other) != []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("3.5", "35"),
        ("3.5", "3 5"),
        (".5", "5"),
        ("HER2+", "HER2-"),
        ("HER2-", "HER2"),
        ("<0.7", ">0.7"),
        (">0.7", ">=0.7"),
        ("-0.7", "0.7"),
        ("5%", "5"),
        ("T1.5", "T15"),
        ("L4-5", "L45"),
    ],
)
def test_texts_that_do_not_say_the_same(one, other):
    assert words(one) != words(other)
    assert value(exact_match([one], [other])) == 0


def test_exact_match_is_the_share_of_equal_words():
    assert value(exact_match(["Effusion!", "mass", "a mass"], ["effusion", "mass", "mass"])) == (
        pytest.approx(2 / 3)
    )


def test_token_f1_by_hand():
    scorer = token_f1(["the left effusion left", "mass", "nodule"], ["left effusion", "mass", "a"])
    # 2 shared of 4 and 2 words: 2 * 2 / 6; then 1; then 0
    assert value(scorer) == pytest.approx((4 / 6 + 1 + 0) / 3)


def test_bleu_is_that_of_sacrebleu():
    texts = [text or "" for text in PREDICTIONS]
    expected = sacrebleu.corpus_bleu(texts, [REFERENCES])
    scorer = bleu(PREDICTIONS, REFERENCES)
    assert value(scorer) == expected.score
    assert 10 < expected.score < 90
    weights = np.array([3, 0, 1, 2, 2])
    drawn = np.repeat(np.arange(5), weights)
    redrawn = sacrebleu.corpus_bleu([texts[i] for i in drawn], [[REFERENCES[i] for i in drawn]])
    assert scorer.score(weights.astype(float)) == redrawn.score != expected.score
    assert value(scorer) != pytest.approx(
        np.mean([value(bleu([text], [REFERENCES[i]])) for i, text in enumerate(texts)])
    )


@pytest.mark.parametrize(
    "prediction",
    ["effusion", "effusion left", "one two three four", "a kind effusion of left lung", ""],
)
def test_bleu_is_that_of_sacrebleu_where_orders_have_no_match(prediction):
    expected = sacrebleu.corpus_bleu([prediction], [["left effusion of a kind"]]).score
    assert value(bleu([prediction], ["left effusion of a kind"])) == expected


def test_the_signature_names_settings_and_version():
    metric = sacrebleu.metrics.BLEU()
    metric.corpus_score(["a"], [["a"]])
    assert bleu_signature() == str(metric.get_signature())
    assert sacrebleu.__version__ in bleu_signature()
    assert "nrefs:1|case:mixed" in bleu_signature()


def test_rouge_l_is_the_mean_of_rouge_score():
    scorer = RougeScorer(["rougeL"])
    each = [
        scorer.score(reference, text or "")["rougeL"].fmeasure
        for text, reference in zip(PREDICTIONS, REFERENCES, strict=True)
    ]
    assert value(rouge_l(PREDICTIONS, REFERENCES)) == pytest.approx(np.mean(each))
    assert len(set(each)) > 3


@pytest.mark.parametrize("metric", METRICS)
def test_the_reference_itself_is_perfect_and_failed_generations_earn_nothing(metric):
    best = value(metric(REFERENCES, REFERENCES))
    assert best == pytest.approx(100 if metric is bleu else 1)
    for failed in (None, "", "  \n"):
        assert value(metric([failed] * 5, REFERENCES)) == 0
        half = [*REFERENCES[:3], failed, failed]
        assert metric(half, REFERENCES).n == 5
        assert value(metric(half, REFERENCES)) < 0.9 * best
        assert value(metric([failed], [""])) == 0


@pytest.mark.parametrize("metric", [*METRICS, closed_accuracy])
def test_rows_must_agree_in_number_and_none_at_all_has_no_value(metric):
    with pytest.raises(ValueError, match="zip"):
        metric(["a"], ["a", "b"])
    nothing = estimate(metric([], []), [])
    assert nothing.value is None
    assert nothing.reason in ("no row", "no reference is yes or no")


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("Yes.", "yes", True),
        ("Yes, there is an effusion.", "Yes", True),
        ("No", "no.", True),
        ("normal", "no", False),
        ("It is not known", "no", False),
        ("Yes or no", "yes", False),
        ("no, yes", "no", False),
        ("yesterday", "yes", False),
        ("No", "yes", False),
        ("nope", "no", True),
        ("Nope, nothing.", "yes", False),
        ("There is none.", "no", True),
        ("None", "yes", False),
        ("yes, no doubt", "yes", True),
        ("yes, no doubt", "no", False),
        ("No doubt.", "yes", True),
        ("There is no doubt that there is.", "no", False),
        ("Without any doubt, no.", "no", True),
        ("Yes, no mass is seen.", "yes", True),
        ("Yes, no mass is seen.", "no", False),
        ("no - yes", "no", False),
        ("Either yes or no.", "no", False),
        ("no and yes", "yes", False),
        ("There is no mass.", "no", True),
        ("The film shows no mass", "yes", False),
        ("river no paper under the mountain", "no", False),
        ("I would say yes", "yes", True),
        ("I would say no", "yes", False),
        ("It is not known, yes or no", "no", False),
        ("There isn't.", "no", True),
        ("It does not", "yes", False),
        ("It is not certain", "no", False),
        ("No image was provided.", "no", False),
        ("There is no way to know", "no", False),
        ("No idea, but I would say no", "no", True),
        ("Is there a mass: No", "no", True),
        ("Is there no mass? Yes.", "yes", True),
        ("The answer is no.", "no", True),
        ("YES\n", "yes", True),
        ("Kein", "no", False),
        (None, "no", False),
        (" ", "yes", False),
    ],
)
def test_a_closed_answer(prediction, reference, right):
    scorer = closed_accuracy([prediction], [reference])
    assert value(scorer) == right
    assert scorer.n == 1


def test_only_closed_questions_count():
    references = ["yes", "no", "left lung", "no effusion", "yes"]
    scorer = closed_accuracy(["yes", "yes", "left lung", "no", None], references)
    assert scorer.n == 3
    assert value(scorer) == pytest.approx(1 / 3)
    found = estimate(closed_accuracy(["left"], ["left"]), ["p"])
    assert (found.value, found.n, found.reason) == (None, 0, "no reference is yes or no")
