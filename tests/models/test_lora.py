"""Adapters sit on exactly what was named; what would not run or not load is an error."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from medft.config.lora_keys import LoraSection
from medft.decoder.families.mllama import MLLAMA
from medft.errors import BaseModelError
from medft.models.base import empty_model
from medft.models.lora import (
    attach_adapter,
    count_by_part,
    plan_adapter,
    target_modules,
)
from medft.siglip import model as siglip_model


@pytest.fixture(scope="module")
def mllama(bases):
    config = AutoConfig.from_pretrained(bases / "decoder")
    return empty_model(AutoModelForImageTextToText, config)


@pytest.fixture(scope="module")
def siglip(bases):
    return empty_model(AutoModel, AutoConfig.from_pretrained(bases / "siglip"))


# 4 text layers: 2 of self-attention, 2 of cross-attention; 4 tower layers; 1 projector
@pytest.mark.parametrize(
    ("preset", "counts"),
    [
        ("language", "28 language"),
        ("language_no_mlp", "16 language"),
        ("cross_attention", "8 language"),
        ("projector", "1 projector"),
        ("vision", "24 vision"),
        ("all", "24 vision, 1 projector, 28 language"),
    ],
)
def test_presets_of_the_decoder_hit_the_parts_they_name(mllama, preset, counts):
    assert preset in MLLAMA.presets
    targets = target_modules(mllama, preset, MLLAMA.presets)
    assert count_by_part(targets, MLLAMA.parts) == counts


def test_every_linear_layer_of_the_decoder_but_the_head_is_in_the_preset_all(mllama):
    linear = {name for name, module in mllama.named_modules() if isinstance(module, nn.Linear)}
    assert linear - target_modules(mllama, "all", MLLAMA.presets).keys() == {"lm_head"}


@pytest.mark.parametrize(
    ("preset", "counts"),
    [("text", "12 text"), ("vision_no_head", "12 vision"), ("both_no_head", "12 vision, 12 text")],
)
def test_presets_of_siglip_hit_the_towers_they_name(siglip, preset, counts):
    targets = target_modules(siglip, preset, siglip_model.PRESETS)
    assert count_by_part(targets, siglip_model.PARTS) == counts


def test_a_bare_name_also_hits_the_tower_and_is_counted(mllama):
    targets = target_modules(mllama, ["q_proj"], MLLAMA.presets)
    assert count_by_part(targets, MLLAMA.parts) == "4 vision, 4 language"


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("langauge", "'langauge' matches none: presets are language"),
        (r".*\.no_such", "matches none"),
        (["q_proj", "qproj"], "'qproj' matches none"),
        ([], "an empty list matches none"),
        ("(", "a regular expression"),
        (r"model\.language_model.*", "linear layers"),
    ],
)
def test_a_target_that_matches_nothing_usable_is_an_error(mllama, targets, message):
    with pytest.raises(BaseModelError, match=message.replace("(", r"\(")):
        target_modules(mllama, targets, MLLAMA.presets)


ENDLESS = "(([a-z.0-9_]+)+)+!"


@pytest.mark.parametrize(
    "changes",
    [
        {"targets": ENDLESS},
        {"exclude_modules": ENDLESS},
        {"rank_pattern": {ENDLESS: 4}},
        {"alpha_pattern": {ENDLESS: 4}},
        {"modules_to_save": [ENDLESS]},
    ],
    ids=str,
)
def test_a_target_that_never_ends_is_one_sentence(mllama, monkeypatch, changes):
    monkeypatch.setattr("medft.models.patterns.SECONDS", 0.5)
    lora = LoraSection(**{"r": 4, "alpha": 8, **changes})
    with pytest.raises(BaseModelError, match=r"matched in 0.5 s|lora\.modules_to_save"):
        attach_adapter(mllama, lora, MLLAMA.presets, task_type=None, seed=5)


def test_patterns_of_ordinary_form_are_taken(bases):
    config = AutoConfig.from_pretrained(bases / "decoder")
    empty = empty_model(AutoModelForImageTextToText, config)
    patterns = {"rank_pattern": {r"layers\.0\..*q_proj": 2}, "exclude_modules": r".*vision.*"}
    lora = LoraSection(r=4, alpha=8, targets="all", **patterns)
    adapted = attach_adapter(empty, lora, MLLAMA.presets, task_type=None, seed=5)
    ranks = {p.shape[0] for name, p in adapted.named_parameters() if "lora_A" in name}
    assert ranks == {2, 4}


@pytest.mark.parametrize("targets", [["out_proj"], r".*head\.attention.*", ["attention"]])
def test_adapters_in_the_pooling_head_which_would_never_run_are_refused(siglip, targets):
    with pytest.raises(BaseModelError, match="never calls it"):
        target_modules(siglip, targets, siglip_model.PRESETS)


def test_the_preset_is_what_peft_adapts_in_float32_and_nothing_else(bases):
    model = AutoModelForImageTextToText.from_pretrained(bases / "decoder", dtype=torch.bfloat16)
    targets = target_modules(model, "language", MLLAMA.presets)
    lora = LoraSection(r=4, alpha=8)
    adapted = attach_adapter(model, lora, MLLAMA.presets, task_type="CAUSAL_LM", seed=5)
    trainable = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[0].removeprefix("base_model.model.") for name in trainable} == set(
        targets
    )
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    expected = sum(4 * (layer.in_features + layer.out_features) for layer in targets.values())
    assert sum(p.numel() for p in trainable.values()) == expected
    frozen = {p.dtype for p in adapted.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}


def test_further_fields_reach_peft_and_its_refusals_are_sentences(bases):
    model = AutoModelForImageTextToText.from_pretrained(bases / "decoder")
    dora = LoraSection(r=4, alpha=8, use_dora=True, rank_pattern={"o_proj": 2})
    adapted = attach_adapter(model, dora, MLLAMA.presets, task_type=None, seed=5)
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert any("magnitude" in name for name in names)
    ranks = {p.shape[0] for n, p in adapted.named_parameters() if "o_proj.lora_A" in n}
    assert ranks == {2}
    model = AutoModelForImageTextToText.from_pretrained(bases / "decoder")
    wrong = LoraSection(r=4, alpha=8, layers_to_transform=[1])
    with pytest.raises(BaseModelError, match="it says: "):
        attach_adapter(model, wrong, MLLAMA.presets, task_type=None, seed=5)


def test_bare_parameters_in_modules_to_save_are_refused(bases):
    model = AutoModel.from_pretrained(bases / "siglip")
    lora = LoraSection(r=4, alpha=8, targets="text", modules_to_save=["logit_scale"])
    with pytest.raises(BaseModelError, match="'logit_scale' is none"):
        attach_adapter(model, lora, siglip_model.PRESETS, task_type=None, seed=5)


@pytest.mark.parametrize(
    ("further", "plan"),
    [
        ({}, "28 language; 16,384 parameters"),
        ({"exclude_modules": ".*self_attn.*"}, "20 language; 12,800 parameters"),
        ({"rank_pattern": {"o_proj": 2}}, "28 language; 15,360 parameters"),
        ({"init_lora_weights": "orthogonal"}, "28 language; 16,384 parameters"),
        ({"use_dora": True}, "28 language; 18,432 parameters"),
    ],
)
def test_the_plan_counts_what_peft_will_train(bases, further, plan):
    config = AutoConfig.from_pretrained(bases / "decoder")
    lora = LoraSection(r=4, alpha=8, **further)
    empty = empty_model(AutoModelForImageTextToText, config)
    planned = plan_adapter(empty, lora, MLLAMA.presets, MLLAMA.parts)
    model = AutoModelForImageTextToText.from_pretrained(bases / "decoder")
    adapted = attach_adapter(model, lora, MLLAMA.presets, task_type=None, seed=5)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    share = trained / sum(p.numel() for p in adapted.parameters())
    assert f"; {trained:,} parameters" in plan
    assert planned == f"{plan}, {share:.2%} of all"


def test_excluding_everything_is_an_error_before_loading(bases):
    config = AutoConfig.from_pretrained(bases / "decoder")
    empty = empty_model(AutoModelForImageTextToText, config)
    lora = LoraSection(exclude_modules=".*")
    with pytest.raises(BaseModelError, match="it says: "):
        plan_adapter(empty, lora, MLLAMA.presets, MLLAMA.parts)


def test_initial_weights_depend_on_the_seed_alone(bases):
    def initial(seed, *, drawn_before):
        model = AutoModelForImageTextToText.from_pretrained(bases / "decoder")
        torch.manual_seed(1)
        torch.rand(drawn_before)  # as ZeRO-3 draws weights that it then loads
        expected = torch.random.get_rng_state()
        lora = LoraSection(r=4, alpha=8)
        adapted = attach_adapter(model, lora, MLLAMA.presets, task_type=None, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), expected)
        return torch.cat([p.flatten() for n, p in adapted.named_parameters() if "lora_A" in n])

    assert torch.equal(initial(7, drawn_before=0), initial(7, drawn_before=3))
    assert not torch.equal(initial(7, drawn_before=0), initial(8, drawn_before=0))
