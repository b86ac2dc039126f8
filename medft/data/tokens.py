"""Lengths of texts in tokens, and texts that have the same tokens."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from medft.data.pairs import batched

_AT_ONCE = 1000


def length_percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """The median, the 95th and 99th percentile and the maximum of lengths in tokens.

    Each is the smallest length that occurs and is not below that percentage of them.
    """
    marks = {"median": 50, "p95": 95, "p99": 99, "longest": 100}
    found = np.percentile(lengths, list(marks.values()), method="inverted_cdf").astype(int)
    return dict(zip(marks, found.tolist(), strict=True))


def token_keys(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[dict[str, bytes], dict[str, int]]:
    """Token ids of each text, truncated to max_length, as int32 bytes; and lengths before that."""
    keys, lengths = {}, {}
    for some in batched(texts, _AT_ONCE):
        # not verbose: it warns of long texts, which are measured here and truncated below
        for text, ids in zip(some, tokenizer(some, verbose=False)["input_ids"], strict=True):
            lengths[text] = len(ids)
            if len(ids) > max_length:
                ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
            keys[text] = np.array(ids, dtype=np.int32).tobytes()
    return keys, lengths


def collisions(keys: Mapping[str, bytes]) -> list[list[str]]:
    """Groups of texts that have the same tokens, in the order of their first text."""
    alike: dict[bytes, list[str]] = {}
    for text, key in keys.items():
        alike.setdefault(key, []).append(text)
    return [group for group in alike.values() if len(group) > 1]
