"""How long texts are in tokens, and which of them a tokenizer cannot tell apart."""

from collections.abc import Iterable, Sequence

import numpy as np


def length_percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """The median, the 95th and 99th percentile and the largest of lengths in tokens.

    Each is a length that occurs, the smallest that is not below so many of them.
    """
    marks = {"median": 50, "p95": 95, "p99": 99, "longest": 100}
    found = np.percentile(lengths, list(marks.values()), method="inverted_cdf").astype(int)
    return dict(zip(marks, found.tolist(), strict=True))


def collisions(texts: Iterable[str], tokens: Iterable[Sequence[int]]) -> list[list[str]]:
    """Groups of different texts that have the same tokens, in the order of their first text."""
    alike: dict[tuple[int, ...], dict[str, None]] = {}
    for text, ids in zip(texts, tokens, strict=True):
        alike.setdefault(tuple(ids), {})[text] = None
    return [list(group) for group in alike.values() if len(group) > 1]
