"""The benchmark of a decoder's step runs, on a model small enough to be waited for."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from packaging.version import Version

FILE = Path(__file__).parent.parent.parent / "benchmarks" / "decoder_step.py"


@pytest.fixture
def benchmark():
    spec = importlib.util.spec_from_file_location("decoder_step", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(benchmark):
    tokenizer = benchmark.decoder_tokenizer(benchmark.tokenizer_corpus())
    config = benchmark.small_config(tokenizer)
    for part, width in ((config.vision_config, 64), (config.text_config, 128)):
        part.hidden_size, part.intermediate_size = width, 2 * width
    config.vision_config.attention_heads = config.text_config.num_attention_heads = 4
    config.vision_config.image_size, config.vision_config.vision_output_dim = 56, 64 * 6
    config.text_config.num_key_value_heads = 2
    return config


@pytest.mark.slow
@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"),
    reason="torch's FLOPs of attention know no grouped queries",
)
def test_every_variant_has_stocks_gradients_but_the_one_with_the_fix(
    benchmark, config, monkeypatch, tmp_path
):
    monkeypatch.setattr(benchmark, "ROUNDS", 1)
    tokenizer = benchmark.decoder_tokenizer(benchmark.tokenizer_corpus())
    benchmark.write_base(tmp_path, config, tokenizer)
    row = benchmark.write_row(tmp_path, tokenizer, 56, 4)
    assert len(json.loads(row.read_text())["images"]) == 1
    table = {e["variant"]: e for e in benchmark.compare_small(tmp_path, row, config)}
    gaps = {name: entry["gradient_gap"] for name, entry in table.items()}
    assert max(gaps[name] for name in ("a", "a'", "b", "c", "d")) < 1e-6
    assert gaps["d'"] > 1e-3
    assert table["a"]["flops"] > table["b"]["flops"] > table["c"]["flops"] > table["d"]["flops"]
    assert table["a"]["kept_bytes"]["tower"] > 0 == table["b"]["kept_bytes"]["tower"]
    assert table["a"]["peak_bytes"] > table["b"]["peak_bytes"]


def test_random_weights_of_a_4_bit_base_are_as_bitsandbytes_makes_them(benchmark, config):
    model = benchmark.random_model(config, dtype=torch.float32, is_4bit=True, device="cpu")
    layers = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 70  # 10 layers of 7
    assert all("language_model.layers" in name for name in layers)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(7, 27)[None]).logits
    assert logits.isfinite().all()
    assert logits.std() > 0
