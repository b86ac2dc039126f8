"""An unknown key is answered with the right one."""

import pytest
from good_recipe import GOOD, problems

from medft.config.advice import FOREIGN_KEYS
from medft.config.recipe import DecoderRecipe, SiglipRecipe, key_paths


@pytest.mark.parametrize(
    ("old", "new", "line", "advice"),
    [
        ("base:", "bsae: x, base:", 1, "did you mean model.base?"),
        ("{train: train.jsonl}", "{train: a, validaton: b}", 2, "did you mean data.validation?"),
        ("learning_rate:", "learing_rate:", 5, "did you mean train.learning_rate?"),
        ("model:", "modle: {}\nmodel:", 1, "did you mean model?"),
        ("model:", "lora: {r: 4, alhpa: 3}\nmodel:", 1, "did you mean lora.alpha?"),
        ("model:", "quantization: {bit: 4}\nmodel:", 1, "did you mean quantization.bits?"),
        ("model:", "lora: {lora_rank: 4}\nmodel:", 1, "here it is lora.r"),
        ("model:", "cutoff_len: 4\nmodel:", 1, "here it is data.max_length"),
        ("learning_rate:", "micro_batch_size: 4\n  learning_rate:", 5, "train.per_device"),
        ("learning_rate:", "load_in_4bit: true\n  learning_rate:", 5, "quantization.bits"),
        ("base:", "learning_rate: 3, base:", 1, "here it is train.learning_rate"),
        ("{train: train.jsonl}", "{train: a, image_size: 4}", 2, "belongs to siglip recipes"),
        ("model:", "contrastive: {}\nmodel:", 1, "siglip_lora.py"),
    ],
)  # fmt: skip
def test_an_unknown_key_names_its_line_and_the_right_key(load, old, new, line, advice):
    found = problems(load, GOOD.replace(old, new, 1))
    assert any(f"recipe.yaml:{line}: unknown key" in text and advice in text for text in found)


def test_quantization_of_siglip_is_refused_with_the_reason(load):
    [problem] = problems(load, GOOD + "quantization: {bits: 4}\n", kind=SiglipRecipe)
    assert "not trained on a 4-bit base" in problem


@pytest.mark.parametrize("kind", [DecoderRecipe, SiglipRecipe])
def test_the_table_of_other_tools_names_points_at_real_keys(kind):
    real = {".".join(name) for name in [*key_paths(DecoderRecipe), *key_paths(SiglipRecipe)]}
    assert {target.split(" ")[0] for target in FOREIGN_KEYS.values()} <= real
    own = {name[-1] for name in key_paths(kind)}
    assert not own & FOREIGN_KEYS.keys()
