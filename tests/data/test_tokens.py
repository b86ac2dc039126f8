"""Lengths in tokens, and texts that a tokenizer cannot tell apart."""

import numpy as np
from transformers import AutoProcessor

from medft.data.tokens import collisions, length_percentiles, token_keys


def test_percentiles_are_lengths_that_occur():
    lengths = [3] * 90 + [10] * 8 + [50, 700]
    found = length_percentiles(lengths)
    assert found == {"median": 3, "p95": 10, "p99": 50, "longest": 700}


def test_siglips_tokenizer_loses_signs_and_points(bases):
    tokenizer = AutoProcessor.from_pretrained(bases / "siglip", backend="pil").tokenizer
    texts = ["HER2+", "a cyst", "HER2-", "3.5 cm", "35 cm", "two cysts"]
    keys, lengths = token_keys(texts, tokenizer, 64)
    assert collisions(keys) == [["HER2+", "HER2-"], ["3.5 cm", "35 cm"]]
    assert lengths["two cysts"] == len(tokenizer("two cysts")["input_ids"])
    assert np.frombuffer(keys["a cyst"], np.int32).tolist() == tokenizer("a cyst")["input_ids"]


def test_texts_that_differ_behind_the_cut_are_alike(bases):
    tokenizer = AutoProcessor.from_pretrained(bases / "siglip", backend="pil").tokenizer
    texts = ["no effusion and a large cyst", "no effusion and a large disc"]
    whole, lengths = token_keys(texts, tokenizer, 64)
    cut, again = token_keys(texts, tokenizer, 6)
    assert (collisions(whole), collisions(cut)) == ([], [texts])
    assert lengths == again
    expected = tokenizer(texts[0], truncation=True, max_length=6)["input_ids"]
    assert np.frombuffer(cut[texts[0]], np.int32).tolist() == expected
