"""Ranks against a loop over sorted similarities, and chance against random orders."""

import tracemalloc

import numpy as np
import pytest

from medft.errors import DataError
from medft.metrics.bootstrap import estimate
from medft.metrics.retrieval import chance_recall, median_rank, ranks, recall_at


def unit(random, count, width=16):
    rows = random.normal(size=(count, width))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def value(scorer):
    return scorer.score(np.ones(len(scorer.rows)))


def brute(similarity, query_keys, candidate_keys):
    """Expected rank by walking the sorted candidates, those of equal similarity at once."""
    found = []
    for row, key in zip(similarity, query_keys, strict=True):
        before = 0
        for level in sorted(set(row.tolist()), reverse=True):
            equal = [k for k, s in zip(candidate_keys, row.tolist(), strict=True) if s == level]
            if key in equal:
                found.append(1 + before + sum(k != key for k in equal) / 2)
                break
            before += len(equal)
    return found


def test_ranks_are_those_of_argsort_with_one_positive_each():
    random = np.random.default_rng(0)
    images = unit(random, 1500)  # more than a block
    texts = unit(random, 1500) + images
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    keys = random.permutation(1500)
    order = np.argsort(-(images @ texts.T), axis=1)
    expected = 1 + np.argmax(order == np.arange(1500)[:, None], axis=1)
    found = ranks(images, texts, keys, keys)
    assert found.tolist() == expected.tolist()
    assert found.max() > 10
    for k in (1, 5, 10):
        assert value(recall_at(found, k)) == pytest.approx(np.mean(expected <= k))
    assert 0 < value(recall_at(found, 1)) < value(recall_at(found, 5)) < 1


def test_ranks_with_several_positives_and_ties():
    random = np.random.default_rng(1)
    queries = random.integers(-1, 2, (40, 3)).astype(float)  # products are small whole numbers
    candidates = random.integers(-1, 2, (30, 3)).astype(float)
    candidate_keys = np.concatenate([np.arange(12), random.integers(0, 12, 18)])
    query_keys = random.integers(0, 12, 40)
    found = ranks(queries, candidates, query_keys, candidate_keys)
    assert found.tolist() == brute(queries @ candidates.T, query_keys, candidate_keys)
    assert (found % 1 == 0.5).any()
    alone = ranks(queries, candidates, np.arange(12)[:1].repeat(40), np.arange(30))
    assert (found != alone).any()


def test_the_best_of_several_positives_counts():
    candidates = np.eye(4)
    queries = np.array([[0.9, 0.8, 0.1, 0.0]])
    assert ranks(queries, candidates, np.array([7]), np.array([5, 6, 7, 6])).tolist() == [3]
    assert ranks(queries, candidates, np.array([6]), np.array([5, 6, 7, 6])).tolist() == [2]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_embeddings_that_are_all_the_same_look_no_better_than_chance(dtype):
    same = np.repeat(unit(np.random.default_rng(2), 1, width=1153), 203, axis=0).astype(dtype)
    found = ranks(same[:101], same, np.arange(101), np.arange(203))
    assert set(found.tolist()) == {102}
    assert value(recall_at(found, 10)) == 0
    several = ranks(same[:101], same, np.zeros(101), np.arange(203) % 2)
    assert several.min() > 50


@pytest.mark.parametrize(("less", "rank"), [(0, 1.5), (1e-14, 1.5), (1e-9, 2)])
def test_similarities_that_differ_by_rounding_alone_are_equal(less, rank):
    candidates = np.array([[1 - less, 0.0], [1.0, 0.0]])
    assert ranks(candidates[1:], candidates, np.array([0]), np.arange(2)).tolist() == [rank]


def test_what_cannot_be_ranked_is_refused():
    rows = np.eye(3)
    with pytest.raises(DataError, match="1 of 3 queries have none, first number 2"):
        ranks(rows, rows, np.array([0, 1, 5]), np.arange(3))
    broken = rows.copy()
    broken[1, 1] = np.nan
    for queries, candidates in ((broken, rows), (rows, broken)):
        with pytest.raises(DataError, match="finite"):
            ranks(queries, candidates, np.arange(3), np.arange(3))


def test_memory_stays_that_of_a_block():
    random = np.random.default_rng(3)
    rows = unit(random, 6000, width=4)
    keys = np.arange(6000)
    tracemalloc.start()
    ranks(rows, rows, keys, keys)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 13_000 * 6000  # all similarities would take 48 kB per candidate


def test_the_median_is_that_of_the_ranks_drawn():
    random = np.random.default_rng(4)
    found = random.integers(1, 40, 31) + random.choice([0, 0.5], 31)
    scorer = median_rank(found)
    assert value(scorer) == np.median(found)
    medians = set()
    for _ in range(200):
        weights = random.multinomial(random.integers(1, 32), np.full(31, 1 / 31))
        expected = np.median(np.repeat(found, weights))
        assert scorer.score(weights.astype(float)) == expected
        medians.add(expected)
    assert len(medians) > 20
    assert value(median_rank(np.array([1.0, 4.0]))) == 2.5


def test_no_query_has_no_value():
    for scorer in (recall_at(np.zeros(0), 5), median_rank(np.zeros(0))):
        assert (estimate(scorer, []).value, estimate(scorer, []).reason) == (None, "no query")


def test_chance_is_what_random_orders_reach():
    random = np.random.default_rng(5)
    positives = np.array([1, 1, 3, 8])
    orders = random.permuted(np.tile(np.arange(40), (5000, 4, 1)), axis=2)
    hits = (orders[..., :5] < positives[:, None]).any(axis=2)
    # 20000 hits or misses: the standard error is below 0.5 / sqrt(20000) = 0.0036
    assert chance_recall(5, positives, 40) == pytest.approx(np.mean(hits), abs=4 * 0.0036)
    assert chance_recall(5, positives, 40) > chance_recall(5, np.ones(4, dtype=int), 40) + 0.1


def test_chance_at_its_ends():
    assert chance_recall(5, np.array([1]), 1000) == pytest.approx(5 / 1000)
    assert chance_recall(1, np.array([3]), 1000) == pytest.approx(3 / 1000)
    assert chance_recall(10, np.array([3]), 8) == 1
    assert chance_recall(2, np.array([7]), 8) == 1
    assert chance_recall(10, np.array([1]), 10**6) == pytest.approx(1e-5)
