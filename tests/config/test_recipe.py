"""A recipe is read strictly: whatever is wrong is an error that names the place and the cure."""

import pytest
from good_recipe import GOOD, problems

from medft.config.recipe import DecoderRecipe, SiglipRecipe


def test_defaults_are_filled_in_and_a_bare_exponent_is_a_number(load):
    recipe = load(GOOD)
    assert recipe.train.learning_rate == 1e-4
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.targets) == (16, 32, "language")
    assert (recipe.quantization.bits, recipe.quantization.type) == (4, "nf4")
    assert (recipe.train.adam_beta2, recipe.train.warmup_steps) == (0.95, 0.1)
    assert recipe.train.eval_strategy is None
    assert recipe.train.save_steps == 0.1
    validated = load(GOOD, "data.validation=v.jsonl").train
    assert (validated.eval_strategy, validated.eval_steps) == ("steps", 0.1)
    assert load(GOOD, "data.validation=v.jsonl", "train.eval_steps=null").train.eval_steps == 0.1
    by_epoch = load(GOOD, "data.validation=v.jsonl", "train.eval_strategy=epoch").train
    assert (by_epoch.eval_strategy, by_epoch.eval_steps) == ("epoch", None)


def test_null_switches_a_section_off(load):
    recipe = load(GOOD + "quantization: null\nlora: null\n")
    assert recipe.quantization is None
    assert recipe.lora is None
    assert load(GOOD, "quantization=null").quantization is None


@pytest.mark.parametrize("kind", [DecoderRecipe, SiglipRecipe])
def test_a_dumped_recipe_loads_as_itself(load, kind):
    text = GOOD.replace("model:", "lora: {r: 8, use_dora: true, rank_pattern: {a: 3}}\nmodel:")
    recipe = load(text, "data.validation=v.jsonl", "train.seed=5", kind=kind)
    assert load(recipe.dump(), kind=kind) == recipe
    assert load(recipe.dump(), "train.seed=6", kind=kind) != recipe


def test_overrides_come_after_the_file_and_are_validated(load):
    assert load(GOOD, "train.learning_rate=3e-5").train.learning_rate == 3e-5
    assert load(GOOD, "lora.targets=[q_proj, v_proj]").lora.targets == ["q_proj", "v_proj"]
    [problem] = problems(load, GOOD, "train.learning_rate=fast")
    assert "override 'train.learning_rate=fast'" in problem
    assert "expected a valid number" in problem
    [problem] = problems(load, GOOD, "learning_rate=1")
    assert "train.learning_rate" in problem


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rate: fast", "a valid number, got 'fast'"),
        ("max_steps: 2.5", "a valid integer, got 2.5"),
        ("gradient_checkpointing: yes", "a valid boolean, got 'yes'"),
        ("seed: true", "a valid integer, got True"),
    ],
)
def test_a_wrong_type_is_an_error(load, text, expected):
    [problem] = problems(load, GOOD.replace("learning_rate: 1e-4", text))
    assert f"expected {expected}" in problem


@pytest.mark.parametrize(
    "text",
    [
        "per_device_train_batch_size: 0",
        "gradient_accumulation_steps: -2",
        "num_train_epochs: .inf",
        "num_train_epochs: 0",
        "learning_rate: .nan",
        "learning_rate: -1",
        "seed: -1",
        "dataloader_num_workers: -1",
        "save_steps: 0",
        "eval_strategy: sometimes",
    ],
)
def test_a_number_out_of_its_range_is_an_error(load, text):
    [problem] = problems(load, GOOD.replace("learning_rate: 1e-4", text))
    assert f"train.{text.partition(':')[0]}: expected" in problem


def test_full_fine_tuning_of_a_4_bit_base_is_refused(load):
    assert "write quantization: null" in problems(load, GOOD + "lora: null\n")[0]


def test_out_of_range_values_and_choices_are_errors(load):
    found = problems(load, GOOD + "lora: {r: 0, dropout: 1.5}\n", "model.dtype=bf16")
    assert any("lora.r: expected greater than or equal to 1" in text for text in found)
    assert any("lora.dropout" in text for text in found)
    assert any("'bfloat16', 'float16' or 'float32', got 'bf16'" in text for text in found)


def test_missing_required_keys_are_all_named(load):
    found = problems(load, "lora: {r: 3}\n")
    assert [text.split(": ")[1].split(" ")[0] for text in found] == [
        "model.base",
        "data.train",
        "train.output_dir",
    ]
    [problem] = problems(load, GOOD.replace("output_dir", "# output_dir"))
    assert "train.output_dir is required" in problem


def test_a_validation_file_that_would_never_be_read_is_an_error(load):
    [problem] = problems(load, GOOD, "data.validation=v.jsonl", "train.eval_strategy='no'")
    assert "never be read" in problem
    [problem] = problems(load, GOOD, "train.eval_strategy=epoch")
    assert "data.validation is missing" in problem


def test_keys_without_effect_in_this_version_are_refused(load):
    assert "lm_head" in problems(load, GOOD, "quantization.skip=[vision]")[0]


def test_home_paths_are_expanded(load, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere/ada")
    assert load(GOOD, "model.base=~/models/x").model.base == "/somewhere/ada/models/x"
