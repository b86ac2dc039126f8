"""What a recipe says is what its trainer has: precision, adapter, scale and bias."""

import json

import pytest
import torch
from siglip_steps import build_trainer

from medft.siglip.model import load_model, scale_and_bias


@pytest.fixture
def make(sections, write_recipe):
    def build(*changes):
        return build_trainer(write_recipe(sections("siglip")), changes)

    return build


def test_scale_and_bias_go_on_where_the_adapter_of_init_from_left_them(make, runs):
    adapter = runs / "siglip" / "adapter"
    record = json.loads((adapter / "medft.json").read_text())
    same = ["lora.r=4", "lora.alpha=8"]
    continued = make(*same, f"lora.init_from={runs / 'siglip'}")
    found = [parameter.item() for parameter in scale_and_bias(continued.model)]
    assert found == [record["logit_scale"], record["logit_bias"]]
    fresh = [parameter.item() for parameter in scale_and_bias(make(*same).model)]
    assert fresh[0] != found[0]
    assert fresh[1] != found[1]


def test_full_fine_tuning_is_in_float32_whatever_the_dtype(make):
    whole = make("lora=null", "model.dtype=bfloat16").model
    assert {p.dtype for p in whole.parameters() if p.requires_grad} == {torch.float32}
    adapted = make("model.dtype=bfloat16").model
    assert adapted.get_base_model().text_model.head.weight.dtype == torch.bfloat16
    assert all(p.requires_grad and p.dtype == torch.float32 for p in scale_and_bias(adapted))


def test_another_way_to_make_the_base_is_taken(sections, write_recipe):
    sizes = []

    def load(model, lora, *, image_size):
        sizes.append(image_size)
        return load_model(model, lora, image_size=image_size)

    build_trainer(write_recipe(sections("siglip")), load=load)
    assert sizes == [84]
