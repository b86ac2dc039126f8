"""An entry of lora that would do nothing, or something else than it says, is an error."""

import pytest
from transformers import AutoConfig, AutoModelForImageTextToText

from medft.config.lora_keys import LoraSection
from medft.config.recipe import DecoderModelSection, QuantizationSection
from medft.decoder.families.gemma3 import GEMMA3
from medft.decoder.families.mllama import MLLAMA
from medft.decoder.model import load_model
from medft.errors import BaseModelError
from medft.models.base import empty_model
from medft.models.lora import attach_adapter, plan_adapter


@pytest.fixture
def plan(bases):
    """Plan an adapter of a tiny base, as is done before weights are loaded."""

    def make(base="decoder", family=MLLAMA, **keys):
        empty = empty_model(AutoModelForImageTextToText, AutoConfig.from_pretrained(bases / base))
        lora = LoraSection(**{"r": 4, "alpha": 8, **keys})
        return plan_adapter(empty, lora, family.presets, family.parts)

    return make


SELF_ATTENTION = "model.language_model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"exclude_modules": ".*vision.*"}, "exclude_modules: .*vision.* does not"),
        ({"exclude_modules": ["o_proj", "fc1"]}, "exclude_modules: fc1 does not"),
        ({"rank_pattern": {"o_proj": 2, "fc1": 2}}, "rank_pattern: fc1 does not"),
        ({"rank_pattern": {".*_proj": 2, "o_proj": 8}}, "rank_pattern: o_proj does not"),
        ({"alpha_pattern": {"proj": 2}}, "alpha_pattern: proj does not"),
        (
            {"exclude_modules": ["o_proj"], "alpha_pattern": {"o_proj": 2}},
            "alpha_pattern: o_proj does not",
        ),
        ({"targets": ["fc1"], "layers_to_transform": [0, 99]}, "layers_to_transform: 99 does not"),
        (
            {"targets": ["fc1"], "layers_to_transform": 0, "layers_pattern": ["layers", "h"]},
            "layers_pattern: h does not",
        ),
        (
            {"targets": [SELF_ATTENTION, "k_proj"], "layers_to_transform": 2},
            f"{SELF_ATTENTION} is a full name, which PEFT adapts whatever its layer",
        ),
        (
            {"targets": ["q_proj", "o_proj"], "modules_to_save": ["o_proj"]},
            "targets: o_proj does not",
        ),
        (
            {"targets": ["q_proj", "fc1"], "layers_to_transform": 0, "exclude_modules": ["fc1"]},
            "targets: fc1 does not",
        ),
        ({"modules_to_save": ["norm"]}, "PEFT takes 'norm' for .*layernorm.* too"),
        ({"modules_to_save": ["act_fn"]}, "act_fn has no weights"),
    ],
    ids=str,
)
def test_an_entry_that_would_do_nothing_or_more_is_refused_before_loading(plan, keys, named):
    with pytest.raises(BaseModelError, match=named):
        plan(**keys)


@pytest.mark.parametrize(
    ("keys", "counts"),
    [
        ({"targets": ["q_proj"], "layers_to_transform": 1}, "1 vision, 1 language; "),
        (
            {"targets": ["fc1"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
            "3 vision; ",
        ),
        ({"exclude_modules": ["o_proj", "mlp.up_proj"]}, "20 language; "),
        ({"rank_pattern": {"o_proj": 8, ".*_proj": 2}}, "28 language; "),
        ({"modules_to_save": ["language_model.norm"]}, "28 language; "),
    ],
    ids=str,
)
def test_entries_that_do_something_are_taken(plan, keys, counts):
    assert plan(**keys).startswith(counts)


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_a_copy_of_one_of_two_tied_modules_is_refused(plan, module):
    """Merged, the configuration would tie them again and one of the two be lost."""
    with pytest.raises(BaseModelError, match=f"{module} shares weights with .* would stay"):
        plan("gemma3", GEMMA3, modules_to_save=[module])
    plan("decoder", MLLAMA, modules_to_save=[module])


def test_a_copy_of_a_4_bit_module_is_one_sentence_and_of_another_is_taken(bases):
    section = DecoderModelSection(base=str(bases / "decoder"), dtype="float32")
    for name, refused in (("o_proj", True), ("language_model.norm", False)):
        model = load_model(section, MLLAMA, QuantizationSection(), dtype="float32")
        lora = LoraSection(r=4, targets=["q_proj"], modules_to_save=[name])
        if refused:
            with pytest.raises(BaseModelError, match="o_proj is 4-bit: leave it out"):
                attach_adapter(model, lora, MLLAMA.presets, task_type=None, seed=5)
        else:
            attach_adapter(model, lora, MLLAMA.presets, task_type=None, seed=5)
