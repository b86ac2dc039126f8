"""A recipe is read strictly: whatever is wrong is an error that names the place and the cure."""

import pytest

from medft.config.advice import FOREIGN_KEYS
from medft.config.recipe import DecoderRecipe, SiglipRecipe, key_paths
from medft.config.train_keys import EARLY_STOPPING_KEYS, REFUSED_TRAIN_KEYS, TrainSection
from medft.errors import RecipeError

GOOD = """\
model: {base: some/base}
data: {train: train.jsonl}
train:
  output_dir: runs/x
  learning_rate: 1e-4
"""


@pytest.fixture
def load(tmp_path):
    def load(text, *overrides, kind=DecoderRecipe):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return kind.load(path, overrides)

    return load


def problems(load, text, *overrides, kind=DecoderRecipe):
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides, kind=kind)
    return caught.value.problems


def test_defaults_are_filled_in_and_a_bare_exponent_is_a_number(load):
    recipe = load(GOOD)
    assert recipe.train.learning_rate == 1e-4
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.targets) == (16, 32, "language")
    assert (recipe.quantization.bits, recipe.quantization.type) == (4, "nf4")
    assert (recipe.train.adam_beta2, recipe.train.warmup_steps) == (0.95, 0.1)
    assert recipe.train.eval_strategy is None
    assert load(GOOD, "data.validation=v.jsonl").train.eval_strategy == "epoch"


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


@pytest.mark.parametrize("word", ["train.seed", "a.b.c=1", "=1", "train.=2", "train.seed=[1"])
def test_a_malformed_override_is_an_error(load, word):
    [problem] = problems(load, GOOD, word)
    assert "override" in problem


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


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("max_length: 5", "data.max_length"),
        ("packing: true", "packing"),
        ("padding_free: true", "padded"),
        ("assistant_only_loss: true", "assistant"),
        ("completion_only_loss: true", "assistant"),
        ("model_init_kwargs: {}", "section model"),
        ("remove_unused_columns: true", "images"),
        ("load_best_model_at_end: true", "best_model/"),
        ("deepspeed: x.json", "launcher"),
        ("fsdp: full_shard", "launcher"),
        ("bf16: true", "model.dtype"),
        ("fp16: false", "model.dtype"),
    ],
)
def test_train_keys_that_medft_owns_are_refused_with_the_reason(load, key, reason):
    [problem] = problems(load, GOOD + f"  {key}\n")
    assert "recipe.yaml:6: train." in problem
    assert reason in problem


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


@pytest.mark.parametrize("text", ["? [a]\n: b\n", "a: &a [*a]\n", "lora: {1: 2}\n", "1: 2\n"])
def test_strange_yaml_is_one_sentence(load, text):
    [problem] = problems(load, text)
    assert "expected" in problem


def test_every_field_of_the_library_is_taken_or_refused():
    import dataclasses

    from transformers import TrainingArguments
    from trl import SFTConfig

    own = TrainSection.model_fields.keys() - EARLY_STOPPING_KEYS
    for library in (SFTConfig, TrainingArguments):
        assert {field.name for field in dataclasses.fields(library)} > own
    assert not TrainSection.model_fields.keys() & REFUSED_TRAIN_KEYS.keys()


def test_the_train_section_shows_what_was_written_and_medfts_defaults(load):
    """A key that nobody wrote stays the library's; a whole number stays one; null is no number."""
    shown = load(GOOD, "train.save_steps=4", "train.save_total_limit=null").train.model_dump()
    assert {key: shown[key] for key in ("save_steps", "save_total_limit", "weight_decay")} == {
        "save_steps": 4,
        "save_total_limit": None,
        "weight_decay": 0.01,
    }
    assert isinstance(shown["save_steps"], int)
    assert not {"gradient_accumulation_steps", "optim", "tf32"} & shown.keys()
    for key in ("gradient_accumulation_steps", "optim", "num_train_epochs"):
        [problem] = problems(load, GOOD, f"train.{key}=null")
        assert "got None" in problem
    assert load(GOOD).train.early_stopping() == {}
    stopping = load(GOOD, "data.validation=v.jsonl", "train.early_stopping_patience=3").train
    assert stopping.early_stopping() == {"early_stopping_patience": 3}
    assert not stopping.library_fields().keys() & {*EARLY_STOPPING_KEYS, "resume_from_checkpoint"}


def test_a_field_that_medft_does_not_know_is_refused_not_passed_on(load):
    [problem] = problems(load, GOOD + "  hub_model_id: x\n")
    assert "train.hub_model_id is refused: medft does not pass it on" in problem


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


@pytest.mark.parametrize("values", ["pissa_niter_4", "eva", "lora_ga"])
def test_first_values_that_peft_draws_anew_or_leaves_out_are_refused(load, values):
    [problem] = problems(load, GOOD, f"lora.init_lora_weights={values}")
    assert f"{values} is refused: gaussian, orthogonal, pissa, olora give" in problem


def test_further_lora_keys_are_those_of_peft_and_typed(load):
    recipe = load(GOOD + "lora: {use_rslora: true, init_lora_weights: pissa}\n")
    assert recipe.lora.model_extra == {"use_rslora": True, "init_lora_weights": "pissa"}
    assert "valid boolean" in problems(load, GOOD + "lora: {use_rslora: 'on'}\n")[0]
    assert "lora.alpha" in problems(load, GOOD + "lora: {lora_alpha: 4}\n")[0]


@pytest.mark.parametrize(
    ("text", "line"),
    [("model: {base: x}\nmodel: {base: y}\n", 2), ("model: [\n", 2), ("a: b: c\n", 1)],
)
def test_broken_yaml_names_the_line(load, text, line):
    [problem] = problems(load, text)
    assert f"recipe.yaml:{line}" in problem


def test_empty_and_missing_files_are_errors(load, tmp_path):
    assert "found nothing" in problems(load, "")[0]
    with pytest.raises(RecipeError, match="could not read it"):
        DecoderRecipe.load(tmp_path / "none.yaml")


def test_a_validation_file_that_would_never_be_read_is_an_error(load):
    [problem] = problems(load, GOOD, "data.validation=v.jsonl", "train.eval_strategy='no'")
    assert "never be read" in problem
    [problem] = problems(load, GOOD, "train.eval_strategy=epoch")
    assert "data.validation is missing" in problem


def test_keys_without_effect_in_this_version_are_refused(load):
    assert "lm_head" in problems(load, GOOD, "quantization.skip=[vision]")[0]


@pytest.mark.parametrize("kind", [DecoderRecipe, SiglipRecipe])
def test_the_table_of_other_tools_names_points_at_real_keys(kind):
    real = {".".join(name) for name in [*key_paths(DecoderRecipe), *key_paths(SiglipRecipe)]}
    assert {target.split(" ")[0] for target in FOREIGN_KEYS.values()} <= real
    own = {name[-1] for name in key_paths(kind)}
    assert not own & FOREIGN_KEYS.keys()


def test_home_paths_are_expanded(load, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere/ada")
    assert load(GOOD, "model.base=~/models/x").model.base == "/somewhere/ada/models/x"
