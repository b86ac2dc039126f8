"""Findings that predictions and references assert, compared: "finding F1 (keywords)".

It compares what `assertions.mentions` reads in two texts. It separates two texts that BLEU does
not, and it is not a measure of medical accuracy.

Shape letters in this file:
    N  pairs of a prediction and a reference
"""

from collections.abc import Sequence

import numpy as np

from medft.metrics.assertions import mentions
from medft.metrics.bootstrap import Scorer, ratio
from medft.metrics.lexicon import Lexicon

LEAST_READ = 0.3
"""Smallest fraction of references that must be read for a score."""


def finding_f1(
    predictions: Sequence[str | None], references: Sequence[str], lexicon: Lexicon
) -> Scorer:
    """Micro F1 of the (finding, side) items that predictions and references assert, in [0, 1].

    All items count equally, "no finding" included; the right finding on the wrong side is wrong.
    Rows whose reference is not read are not counted, whatever the prediction. A prediction that is
    not read counts as one wrong item. Undefined, with the reason, where fewer than `LEAST_READ` of
    the references are read. Report it as "finding F1 (keywords)", beside `read_share`.

    Source: 2 tp / (2 tp + fp + fn) over the items of `mentions`.
    """
    expected = [mentions(reference, lexicon) for reference in references]
    given = [mentions(text, lexicon) for text in predictions]
    rows = np.array([bool(items) for items in expected], dtype=bool)
    pairs = list(zip(given, expected, strict=True))
    shared = np.array([2 * len(got & items) for got, items in pairs]) * rows
    named = np.array([max(len(got), 1) + len(items) for got, items in pairs]) * rows
    if rows.sum() < LEAST_READ * len(rows):
        reason = (
            f"the lexicon reads {rows.sum()} of {len(rows)} references, fewer than {LEAST_READ:.0%}"
        )
        return Scorer(rows=rows, score=lambda weights: float("nan"), undefined=reason)
    return ratio(shared, named, rows, "the lexicon reads no reference")


def read_share(texts: Sequence[str | None], lexicon: Lexicon) -> float:
    """Fraction of the texts in which the lexicon reads an assertion, in [0, 1].

    Args:
        texts: at least one.
        lexicon: the words to read by.
    """
    return float(np.mean([bool(mentions(text, lexicon)) for text in texts]))
