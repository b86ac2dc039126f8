"""Retrieval metrics: ranks of matching candidates, recall at k, median rank, chance recall.

Pure functions: arrays in, numbers out.

Shape letters in this file:
    Q  queries
    C  candidates
    D  embedding width
    B  queries in a block
"""

from collections.abc import Mapping

import numpy as np

from medft.errors import DataError
from medft.metrics.bootstrap import Scorer, mean

WAYS = ("image_to_text", "text_to_image")
"""Directions of retrieval."""

RECALLS = (1, 5, 10)
"""Values of k for which recall at k is given."""

_BLOCK = 1024

_EQUAL = 1e-12
"""Similarities that differ by less count as equal. The float64 product of two unit vectors of 2048
entries has a rounding error below 2.3e-13, and equal vectors may be rounded differently."""

_NO_QUERY = "no query"


def ranks(
    queries: np.ndarray,
    candidates: np.ndarray,
    query_keys: np.ndarray,
    candidate_keys: np.ndarray,
) -> np.ndarray:
    """The rank, from 1, of the best positive of each query; [Q] float64.

    A positive is any candidate with the query's key, so that equal captions all count. Half of the
    non-positives as near as the best positive count as ranked before it. That is the expected rank
    of a single positive among ties, and never better than that of several: embeddings that are all
    the same look no better than they are.

    Similarities are computed for 1024 queries at a time and need 13 kB per candidate.

    Args:
        queries: [Q, D] embeddings, rows of unit L2 norm.
        candidates: [C, D] embeddings, rows of unit L2 norm.
        query_keys: [Q] integers.
        candidate_keys: [C] integers.

    Raises:
        DataError: a query has no positive, or an embedding is not finite.
    """
    alone = np.flatnonzero(~np.isin(query_keys, candidate_keys))
    if len(alone):
        raise DataError(
            f"expected a candidate with the key of every query, {len(alone)} of {len(query_keys)} "
            f"queries have none, first number {alone[0]}: add their candidates or leave them out"
        )
    if not (np.isfinite(queries).all() and np.isfinite(candidates).all()):
        raise DataError(
            "expected finite embeddings, some hold nan or infinity: compute them in float32, or "
            "use an earlier checkpoint"
        )
    pool = np.asarray(candidates, dtype=np.float64)
    found = np.empty(len(queries))
    for start in range(0, len(queries), _BLOCK):
        block = slice(start, start + _BLOCK)
        similarity = np.asarray(queries[block], dtype=np.float64) @ pool.T
        found[block] = _ranked(similarity, query_keys[block, None] == candidate_keys)
        del similarity  # free it before the next block is computed
    return found


def _ranked(similarity: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """[B] ranks from [B, C] similarities and the [B, C] mask of positives."""
    best = similarity.max(axis=1, where=positive, initial=-np.inf, keepdims=True)
    before = np.count_nonzero(similarity > best + _EQUAL, axis=1)
    up_to = np.count_nonzero((similarity >= best - _EQUAL) & ~positive, axis=1)
    return 1 + before + (up_to - before) / 2


def ranks_both_ways(
    images: np.ndarray, texts: np.ndarray, keys: np.ndarray
) -> dict[str, np.ndarray]:
    """The ranks of each image among the texts and of each text among the images, by direction.

    Args:
        images: [Q, D] embeddings, rows of unit L2 norm.
        texts: [Q, D] embeddings, rows of unit L2 norm.
        keys: [Q], equal for pairs whose images and texts match each other.

    Raises:
        DataError: as from `ranks`.
    """
    found = (ranks(images, texts, keys, keys), ranks(texts, images, keys, keys))
    return dict(zip(WAYS, found, strict=True))


def retrieval_scorers(found: Mapping[str, np.ndarray]) -> dict[str, Scorer]:
    """Scorers of recall at k and median rank in each direction, by metric name.

    Args:
        found: [Q] ranks, by direction.
    """
    scorers = {}
    for way in WAYS:
        for k in RECALLS:
            scorers[f"{way}_recall@{k}"] = recall_at(found[way], k)
        scorers[f"{way}_median_rank"] = median_rank(found[way])
    return scorers


def recall_at(ranks: np.ndarray, k: int) -> Scorer:
    """Fraction of the queries with a positive in the top k, in [0, 1].

    Args:
        ranks: [Q], from 1.
        k: candidates retrieved for a query.
    """
    return mean(ranks <= k, _NO_QUERY)


def median_rank(ranks: np.ndarray) -> Scorer:
    """The median rank, from 1; the mean of the two middle ones where their number is even.

    Args:
        ranks: [Q], from 1.
    """
    order = np.argsort(ranks, kind="stable")
    ascending = ranks[order]

    def score(weights: np.ndarray) -> float:
        drawn = weights[order].cumsum()
        if not weights.any():
            return float("nan")
        lower = np.searchsorted(drawn, drawn[-1] / 2, side="left")
        upper = np.searchsorted(drawn, drawn[-1] / 2, side="right")
        return float((ascending[lower] + ascending[upper]) / 2)

    return Scorer(rows=np.ones(len(ranks), dtype=bool), score=score, undefined=_NO_QUERY)


def chance_recall(k: int, positives_per_query: np.ndarray, pool: int) -> float:
    """Expected recall at k of a random order of the candidates, in [0, 1].

    Args:
        k: candidates retrieved for a query.
        positives_per_query: [Q] numbers of positives, each at most pool.
        pool: C, the number of candidates.

    Source: 1 - C(pool - p, k) / C(pool, k) for p positives, from the hypergeometric probability of
    no positive among k, as a product over the candidates drawn.
    """
    positives, queries = np.unique(positives_per_query, return_counts=True)
    drawn = np.arange(min(k, pool))
    others_left = np.maximum(pool - positives[:, None] - drawn, 0)
    missed = (others_left / (pool - drawn)).prod(axis=1)
    return float(np.average(1 - missed, weights=queries))


def chance_recalls(positives_per_query: np.ndarray, pool: int) -> dict[str, float]:
    """`chance_recall` for each of RECALLS, by name."""
    return {f"recall@{k}": chance_recall(k, positives_per_query, pool) for k in RECALLS}
