"""Word-level similarity of generated texts to their references.

Pure functions. A prediction that is None or blank is a failed generation: it stays in every
denominator and matches nothing. None of these metrics measures medical correctness: BLEU and
ROUGE-L hardly change where one word reverses the meaning.

Shape letters in this file:
    N  pairs of a prediction and a reference
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from medft.metrics.bootstrap import Scorer, mean, ratio

_NO_ROW = "no row"
_OPPOSITE = {"yes": "no", "no": "yes"}

_SIGNS = str.maketrans({"\u2212": "-", "\u2264": "<=", "\u2265": ">="})

_WORD = re.compile(
    r"[^\W_]+(?:(?<=\d)\.\d[^\W_]*)*"  # a word or a number, with its decimals
    r"|(?<!\w)\.\d+"
    r"|[<>]=?|[+%]"
    r"|(?<=\w)-(?!\w)"  # HER2-
    r"|(?<![^\s(\[<>=])-(?=\.?\d)"  # -0.7
)


def words(text: str) -> list[str]:
    """The case-folded words, numbers and signs of a text, for comparison.

    A decimal number is one word. The signs + % < > <= >= are separate words, and so is a minus that
    ends a word (HER2-) or begins a number (-0.7). Hyphens inside words, dashes between blanks and
    other punctuation are dropped.
    """
    return _WORD.findall(text.translate(_SIGNS).casefold())


def exact_match(predictions: Sequence[str | None], references: Sequence[str]) -> Scorer:
    """Fraction of the predictions whose words equal those of the reference, in [0, 1]."""
    pairs = _worded(predictions, references)
    return mean(np.array([bool(got) and got == expected for got, expected in pairs]), _NO_ROW)


def token_f1(predictions: Sequence[str | None], references: Sequence[str]) -> Scorer:
    """Mean word-overlap F1 of prediction and reference, in [0, 1].

    Articles are kept, unlike in the source.

    Source: Rajpurkar et al., SQuAD, 2016 (arXiv:1606.05250), section 6.1.
    """
    pairs = _worded(predictions, references)
    return mean(np.array([_shared(got, expected) for got, expected in pairs]), _NO_ROW)


def bleu(predictions: Sequence[str | None], references: Sequence[str]) -> Scorer:
    """Corpus BLEU of sacrebleu with its default settings, 0 to 100.

    N-gram counts are computed once per row and summed with the weights, so that a resample has a
    corpus BLEU, not a mean of sentence scores.

    Source: Papineni et al., 2002, as in sacrebleu (Post, 2018, arXiv:1804.08771).
    """
    metric = BLEU()
    order = metric.max_ngram_order
    counts = np.zeros((len(references), 2 * order + 2))
    for index, (text, reference) in enumerate(zip(predictions, references, strict=True)):
        row = metric.corpus_score([text or ""], [[reference]])
        counts[index] = [*row.counts, *row.totals, row.sys_len, row.ref_len]

    def score(weights: np.ndarray) -> float:
        if not weights.any():
            return float("nan")
        sums = (weights @ counts).astype(int).tolist()
        return metric.compute_bleu(
            correct=sums[:order],
            total=sums[order : 2 * order],
            sys_len=sums[-2],
            ref_len=sums[-1],
            smooth_method=metric.smooth_method,
            smooth_value=metric.smooth_value,
            effective_order=metric.effective_order,
            max_ngram_order=order,
        ).score

    return Scorer(rows=np.ones(len(references), dtype=bool), score=score, undefined=_NO_ROW)


def bleu_signature() -> str:
    """The settings and version of sacrebleu behind `bleu`, in its own notation."""
    metric = BLEU()
    metric.corpus_score([""], [[""]])  # the number of references is known only after scoring
    return str(metric.get_signature())


def rouge_l(predictions: Sequence[str | None], references: Sequence[str]) -> Scorer:
    """Mean ROUGE-L F1 of rouge_score without stemming, in [0, 1].

    Its words are those of rouge_score, which drops signs and splits decimals.

    Source: Lin, ROUGE, 2004, section 3.1, as in rouge_score.
    """
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    values = [
        scorer.score(reference, text or "")["rougeL"].fmeasure
        for text, reference in zip(predictions, references, strict=True)
    ]
    return mean(np.array(values), _NO_ROW)


def closed_accuracy(predictions: Sequence[str | None], references: Sequence[str]) -> Scorer:
    """Fraction of the closed questions answered correctly, in [0, 1].

    A question is closed if its reference is the single word yes or no. An answer is correct if it
    has the reference's word and not the opposite one.
    """
    pairs = _worded(predictions, references)
    closed = [len(expected) == 1 and expected[0] in _OPPOSITE for _, expected in pairs]
    right = [
        is_closed and expected[0] in got and _OPPOSITE[expected[0]] not in got
        for is_closed, (got, expected) in zip(closed, pairs, strict=True)
    ]
    rows = np.array(closed, dtype=bool)
    return ratio(np.array(right), rows, rows, "no reference is yes or no")


def _worded(
    predictions: Sequence[str | None], references: Sequence[str]
) -> list[tuple[list[str], list[str]]]:
    return [
        (words(text or ""), words(reference))
        for text, reference in zip(predictions, references, strict=True)
    ]


def _shared(got: list[str], expected: list[str]) -> float:
    shared = (Counter(got) & Counter(expected)).total()
    return 2 * shared / (len(got) + len(expected)) if shared else 0.0
