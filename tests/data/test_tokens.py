"""Lengths in tokens, and texts that a tokenizer cannot tell apart."""

from transformers import AutoProcessor

from medft.data.tokens import collisions, length_percentiles


def test_percentiles_are_lengths_that_occur():
    lengths = [3] * 90 + [10] * 8 + [50, 700]
    found = length_percentiles(lengths)
    assert found == {"median": 3, "p95": 10, "p99": 50, "longest": 700}


def test_siglips_tokenizer_loses_signs_and_points(bases):
    tokenizer = AutoProcessor.from_pretrained(bases / "siglip", backend="pil").tokenizer
    texts = ["HER2+", "a cyst", "HER2-", "3.5 cm", "35 cm", "two cysts"]
    ids = tokenizer(texts)["input_ids"]
    assert collisions(texts, ids) == [["HER2+", "HER2-"], ["3.5 cm", "35 cm"]]
    assert collisions(["a", "a"], [[1], [1]]) == []
