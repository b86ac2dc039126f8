"""The benchmark of the exact batch runs, on a model small enough to be waited for."""

import pytest
from contrastive import compare, siglip_config


def test_the_exact_batch_has_the_gradient_of_one_graph_in_less_memory(tmp_path):
    config = siglip_config(width=64, layers=1, heads=4, image_size=32)
    table = {e["variant"]: e for e in compare(tmp_path, config, pairs=8, micro=2, rounds=1)}
    assert table["c"]["cosine"] > 1 - 1e-6
    assert table["c"]["error"] < 1e-5
    assert table["c"]["loss"] == pytest.approx(table["d"]["loss"], rel=1e-6)
    assert table["c"]["peak_mib"] < table["d"]["peak_mib"]
    assert table["a"]["error"] > 0.05
