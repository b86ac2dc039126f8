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
_ANSWERS = {
    **dict.fromkeys(("yes", "yep", "yeah", "yup"), "yes"),
    **dict.fromkeys(("no", "nope", "nah", "none"), "no"),
}
"""Words that answer a closed question."""

_CLAUSE = re.compile(r"[,.;:!?|\n]|\s[-\u2013\u2014]\s|\b(?:or|and)\b", re.IGNORECASE)
_NO_DOUBT = re.compile(r"\b(?:without (?:a |any )?|no )(?:doubt|question)\b", re.IGNORECASE)
_GIVES_NONE = re.compile(
    r"\bno (?:idea|answer|comment|image|response|information|way (?:to|of))\b", re.IGNORECASE
)
"""Begins what is said instead of an answer."""

_ENDS_WITH_NOT = re.compile(
    r"\b(?:is|are|was|were|do|does|did)(?: not|n['\u2019]t)$", re.IGNORECASE
)

_SEES_NO = re.compile(
    r"\b(?:there (?:is|are|was|were)|shows?|demonstrates?|reveals?|see|has|have) no\b"
    r"(?! (?:doubt|question)\b)",
    re.IGNORECASE,
)

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

    A question is closed if its reference is the single word yes or no. An answer is correct if
    `closed_answer` reads it as the reference.
    """
    expected = [" ".join(words(reference)) for reference in references]
    closed = np.array([word in ("yes", "no") for word in expected], dtype=bool)
    given = [closed_answer(text or "") for text in predictions]
    right = [got == word for got, word in zip(given, expected, strict=True)]
    return ratio(np.array(right) * closed, closed, closed, "no reference is yes or no")


def closed_answer(text: str) -> str | None:
    """The answer to a closed question, yes or no; None where a text gives none, or both.

    A "no" counts if it begins the text, ends a clause ("there is none", "I would say no") or stands
    behind a verb such as "there is"; so "yes, no mass is seen" is yes. "Not" counts at the end ("it
    does not"), and "no doubt" is yes. "No idea" and "no image was given" are no answers.
    """
    text = _GIVES_NONE.sub("", text)
    clauses = [words(clause) for clause in _CLAUSE.split(_NO_DOUBT.sub("", text))]
    clauses = [clause for clause in clauses if clause]
    clear = {clause[0] for clause in clauses[:1]} | {clause[-1] for clause in clauses}
    found = {_ANSWERS[word] for word in clear & set(_ANSWERS)}
    if any(_ANSWERS.get(word) == "yes" for clause in clauses for word in clause):
        found.add("yes")
    if not found and (_SEES_NO.search(text) or _ENDS_WITH_NOT.search(text.strip().rstrip(".!"))):
        return "no"
    if not found and _NO_DOUBT.search(text):
        return "yes"
    return found.pop() if len(found) == 1 else None


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
