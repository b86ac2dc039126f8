"""Statistics over the rows of pairs.parquet: numbers are kept, no texts and no images."""

import hashlib
import heapq
from array import array
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SHOWN_PAIRS = 12
"""Pairs shown per source, sampled by a hash of their ids."""

SHOWN_TEXTS = 3
"""Most frequent texts shown per source."""


BLANK = 2
"""Gray levels by which the 32 x 32 means of a blank image differ at most, as JPEG makes them."""


def blank_images(thumbnails: np.ndarray, images: Sequence[int]) -> dict[int, list[int]]:
    """Places of the blank images of each row that has one.

    Args:
        thumbnails: [N, 1024] gray values of all images.
        images: number of images of each row, N together.
    """
    blocks = range(0, len(thumbnails), 2**16)
    spans = [np.ptp(thumbnails[start : start + 2**16], axis=1) for start in blocks]
    blank = np.flatnonzero(np.concatenate([np.zeros(0, np.uint8), *spans]) <= BLANK)
    starts = np.concatenate([[0], np.cumsum(images)])
    rows = np.searchsorted(starts, blank, side="right") - 1
    found: dict[int, list[int]] = defaultdict(list)
    for row, image in zip(rows.tolist(), blank.tolist(), strict=True):
        found[row].append(image - int(starts[row]))
    return found


class Statistics:
    """Counts of all rows, a few bytes per row."""

    def __init__(self) -> None:
        self.words: dict[str, Counter[int]] = defaultdict(Counter)
        """Texts by number of words, by source; words are what blanks separate."""

        self.sides: dict[str, Counter[int]] = defaultdict(Counter)
        """Images by longer side in pixels, by source."""

        self.shapes: dict[str, Counter[str]] = defaultdict(Counter)
        self.licenses: dict[str, Counter[str]] = defaultdict(Counter)
        self._hashes = array("q")
        self._groups: dict[str, array[int]] = defaultdict(lambda: array("q"))
        self._texts: dict[str, array[int]] = defaultdict(lambda: array("q"))
        self._rows: dict[str, array[int]] = defaultdict(lambda: array("q"))
        self._drawn: dict[str, list[tuple[str, int]]] = defaultdict(list)

    def add(self, index: int, row: Mapping[str, Any]) -> None:
        """Count a row.

        Args:
            index: of the row in the file, from 0.
            row: from `read_pairs`, with or without its images.
        """
        source = row["source"]
        self.words[source][len(row["text"].split())] += 1
        self.licenses[source][row["license"] or "none given"] += 1
        self._groups[row["split"]].append(hash(row["group_id"]))
        self._texts[source].append(hash(row["text"]))
        self._rows[source].append(index)
        self._hashes.extend(map(hash, row["sha256"]))
        for width, height in zip(row["width"], row["height"], strict=True):
            self.sides[source][max(width, height)] += 1
            self.shapes[source][_shape(width, height)] += 1
        drawn = self._drawn[source]
        drawn.append((hashlib.sha256(row["id"].encode()).hexdigest(), index))
        if len(drawn) > 50 * SHOWN_PAIRS:
            self._drawn[source] = heapq.nsmallest(SHOWN_PAIRS, drawn)

    def groups(self, split: str) -> int:
        """Number of groups with rows in a split."""
        return len(np.unique(np.array(self._groups.get(split, ()), np.int64)))

    @property
    def images(self) -> int:
        """Number of different images."""
        return len(np.unique(np.array(self._hashes, np.int64)))

    def repeated(self, source: str) -> dict[int, int]:
        """Number of rows with one of the most frequent texts, by index of the first such row."""
        texts = np.array(self._texts.get(source, ()), np.int64)
        _, first, counts = np.unique(texts, return_index=True, return_counts=True)
        order = np.lexsort((first, -counts))[:SHOWN_TEXTS]
        return {self._rows[source][first[i]]: int(counts[i]) for i in order if counts[i] > 1}

    def drawn(self) -> set[int]:
        """Indices of the rows that are shown."""
        return {
            index
            for drawn in self._drawn.values()
            for _, index in heapq.nsmallest(SHOWN_PAIRS, drawn)
        }


def spread(counts: Mapping[int, int]) -> list[int]:
    """Least, 5th, 50th and 95th percentile, and most of counted numbers; zeros if there are none.

    Args:
        counts: how often each number was counted.
    """
    values = np.repeat([*counts] or [0], [*counts.values()] or [1])
    low, middle, high = np.percentile(values, [5, 50, 95]).round().astype(int).tolist()
    return [int(values.min()), low, middle, high, int(values.max())]


def _shape(width: int, height: int) -> str:
    ratio = width / height
    if ratio > 2.5 or ratio < 0.4:
        return "extreme"
    if 0.9 <= ratio <= 1.1:
        return "square"
    return "landscape" if ratio > 1 else "portrait"
