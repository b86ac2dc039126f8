"""The section lora takes what is listed, and says why it refuses the rest of PEFT's fields."""

import dataclasses

import peft
import pytest
from good_recipe import GOOD, problems
from packaging.version import Version

from medft.config import lora_keys
from medft.config.lora_keys import (
    OWN_NAMES,
    REFUSED_INITIAL_WEIGHTS,
    REFUSED_LORA_KEYS,
    LoraSection,
)
from medft.config.recipe import DecoderRecipe, SiglipRecipe

LIBRARY = {field.name for field in dataclasses.fields(peft.LoraConfig)}


def test_every_field_of_peft_is_taken_or_refused_with_its_own_reason():
    taken = (LoraSection.model_fields.keys() - OWN_NAMES.keys()) | set(OWN_NAMES.values())
    assert taken - {"init_from"} <= LIBRARY
    assert not taken & REFUSED_LORA_KEYS.keys()
    if Version(peft.__version__).release[:2] == (0, 21):
        assert taken - {"init_from"} | REFUSED_LORA_KEYS.keys() == LIBRARY


@pytest.mark.parametrize("key", sorted(REFUSED_LORA_KEYS))
def test_a_field_of_peft_is_refused_by_name_with_the_reason(load, key):
    [problem] = problems(load, GOOD + f"lora: {{{key}: 1}}\n")
    assert problem.endswith(f"recipe.yaml:6: lora.{key} is refused: {REFUSED_LORA_KEYS[key]}")


def test_a_field_that_a_newer_peft_adds_is_refused(load, monkeypatch):
    monkeypatch.delitem(lora_keys.REFUSED_LORA_KEYS, "kasa_config")
    [problem] = problems(load, GOOD + "lora: {kasa_config: {}}\n")
    assert "lora.kasa_config is refused: medft does not pass it on: remove the key" in problem
    [problem] = problems(load, GOOD + "lora: {kasa_confi: {}}\n")
    assert "unknown key lora.kasa_confi" in problem


@pytest.mark.parametrize(
    "value", [*REFUSED_INITIAL_WEIGHTS, "pissa_niter_4", "PiSSA", "false", "False"]
)
def test_initial_weights_that_change_the_base_or_start_elsewhere_are_refused(load, value):
    name = value.lower().partition("_niter")[0]
    [problem] = problems(load, GOOD, f"lora.init_lora_weights={value}")
    assert f"lora.init_lora_weights: {value.lower()} is refused" in problem
    assert REFUSED_INITIAL_WEIGHTS[name] in problem
    assert problem.endswith("write true, gaussian or orthogonal")


@pytest.mark.parametrize("value", ["[1]", "1.5", "null_", "uniform", "{a: 1}"])
def test_initial_weights_that_are_none_of_pefts_are_an_error(load, value):
    [problem] = problems(load, GOOD, f"lora.init_lora_weights={value}")
    assert "expected True, 'gaussian' or 'orthogonal', got " in problem


def test_what_peft_takes_is_typed_and_passed_on(load):
    lora = load(
        GOOD + "lora: {use_rslora: true, init_lora_weights: true, alpha_pattern: {q: 3}, "
        "modules_to_save: [x], targets: [q], layers_to_transform: [0, 1], layers_pattern: h}\n"
    ).lora
    assert lora.init_lora_weights is True
    assert lora.library_fields() == {
        "use_rslora": True,
        "init_lora_weights": True,
        "alpha_pattern": {"q": 3},
        "modules_to_save": ["x"],
        "layers_to_transform": [0, 1],
        "layers_pattern": "h",
    }
    assert load(GOOD).lora.library_fields() == {}
    assert "valid boolean" in problems(load, GOOD + "lora: {use_rslora: 'on'}\n")[0]
    assert "lora.alpha" in problems(load, GOOD + "lora: {lora_alpha: 4}\n")[0]
    for empty in ("exclude_modules: []", "layers_to_transform: []", "modules_to_save: []"):
        assert "at least 1 item" in problems(load, GOOD + f"lora: {{{empty}, targets: [q]}}\n")[0]
    for wrong in ("rank_pattern: {q: 0}", "rank_pattern: {q: x}", "alpha_pattern: {q: -1}"):
        assert ".q: expected" in problems(load, GOOD + f"lora: {{{wrong}}}\n")[0]


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("layers_pattern: layers", "needs lora.layers_to_transform"),
        ("layers_to_transform: 1", "needs lora.targets as a list of name endings"),
        ("layers_to_transform: 1, targets: language", "or a regular expression that names the"),
        ("init_lora_weights: orthogonal, r: 3", "orthogonal needs even ranks"),
        ("init_lora_weights: orthogonal, rank_pattern: {q: 3}", "orthogonal needs even ranks"),
        ("init_lora_weights: orthogonal", "quantization stores integers"),
        ("init_lora_weights: true, init_from: x", "both give the adapter's initial weights"),
    ],
)
def test_keys_of_lora_that_exclude_each_other_are_one_sentence(load, lora, message):
    plain = [] if "integers" in message else ["quantization=null"]
    [problem] = problems(load, GOOD + f"lora: {{{lora}}}\n", *plain)
    assert message in problem


def test_initial_weights_that_suit_the_base_are_taken(load):
    plain = GOOD + "quantization: null\nlora: {init_lora_weights: orthogonal}\n"
    assert load(plain).lora.init_lora_weights == "orthogonal"
    assert load(GOOD + "lora: {init_lora_weights: gaussian}\n").lora.targets == "language"


@pytest.mark.parametrize("kind", [DecoderRecipe, SiglipRecipe])
def test_a_run_that_was_begun_before_the_keys_were_listed_has_the_same_section(load, kind):
    """Its record lacks the keys that are null now; resuming compares what is there."""
    then = {"r": 8, "alpha": 16, "dropout": 0.1, "targets": ["q"], "init_from": None}
    lora = kind.model_fields["lora"].default.model_copy(update=then)
    now = lora.model_dump()
    assert {key: value for key, value in now.items() if value is not None} == {
        key: value for key, value in then.items() if value is not None
    }
