"""Position embeddings are interpolated once, exactly; scale and bias are trained and restored."""

import pytest
import torch
from transformers import AutoModel, SiglipConfig, SiglipModel

from medft.config.lora_keys import SiglipLoraSection
from medft.config.recipe import ModelSection
from medft.errors import BaseModelError
from medft.models.lora import attach_adapter
from medft.models.saved import SavedRecord
from medft.siglip.model import (
    PRESETS,
    load_model,
    resize_positions,
    restore_scale_and_bias,
    scale_and_bias,
    scale_and_bias_record,
    train_scale_and_bias,
)

LORA = SiglipLoraSection(r=4, alpha=8)


@pytest.fixture
def section(bases):
    return ModelSection(base=str(bases / "siglip"), dtype="float32")


@pytest.mark.parametrize("size", [84, 112, 28])
def test_interpolating_once_is_what_transformers_does_on_every_forward(section, size, tmp_path):
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    stock = AutoModel.from_pretrained(section.base)
    with torch.no_grad():
        expected = stock.vision_model(pixels, interpolate_pos_encoding=True).pooler_output
        model = load_model(section, LORA, image_size=size)
        assert torch.equal(model.vision_model(pixels).pooler_output, expected)
        model.save_pretrained(tmp_path / "resized")
        again = AutoModel.from_pretrained(tmp_path / "resized")
        assert torch.equal(again.vision_model(pixels).pooler_output, expected)
    assert again.config.vision_config.image_size == size
    with pytest.raises(RuntimeError, match="must match"):
        stock.vision_model(pixels)  # the trap: without the flag a stock forward refuses


@pytest.mark.parametrize("size", [224, 256, 384, 512])
def test_released_sizes_become_448(size, tmp_path):
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = SiglipConfig(
        vision_config={**tower, "num_hidden_layers": 1, "image_size": size, "patch_size": 16},
        text_config={**tower, "num_hidden_layers": 1, "vocab_size": 32, "projection_size": 16},
    )
    torch.manual_seed(size)
    model = SiglipModel(config).eval()
    pixels = torch.randn(1, 3, 448, 448)
    with torch.no_grad():
        expected = model.vision_model(pixels, interpolate_pos_encoding=True).pooler_output
        resize_positions(model, 448)
        model.save_pretrained(tmp_path)
        again = AutoModel.from_pretrained(tmp_path).eval()
        found = again.vision_model(pixels).pooler_output
    # the embeddings lie otherwise in memory, which changes the order of summation
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert again.vision_model.embeddings.position_embedding.weight.shape == (28 * 28, 16)


def test_the_bases_own_size_is_left_alone(section):
    model = load_model(section, LORA, image_size=56)
    before = model.vision_model.embeddings.position_embedding
    resize_positions(model, 56)
    assert model.vision_model.embeddings.position_embedding is before


def test_peft_freezes_scale_and_bias_and_medft_frees_them(section):
    model = load_model(section, LORA, image_size=56)
    adapted = attach_adapter(model, LORA, PRESETS, task_type=None, seed=5)
    assert not any(p.requires_grad for p in scale_and_bias(adapted))  # the trap
    train_scale_and_bias(adapted)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in scale_and_bias(adapted))


def test_scale_and_bias_are_not_rounded_where_the_towers_are(section, tmp_path):
    base = AutoModel.from_pretrained(section.base)
    torch.nn.init.constant_(base.logit_scale, 4.7651)
    torch.nn.init.constant_(base.logit_bias, -12.9321)
    base.save_pretrained(tmp_path)
    stock = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert abs(stock.logit_scale.float().exp() - base.logit_scale.exp()) > 0.5  # the trap
    rounded = ModelSection(base=str(tmp_path), dtype="bfloat16")
    for targets in ("both", "text"):
        model = load_model(rounded, SiglipLoraSection(targets=targets), image_size=84)
        assert torch.equal(model.logit_scale, base.logit_scale)
        assert torch.equal(model.logit_bias, base.logit_bias)
        towers = [p for n, p in model.named_parameters() if "logit" not in n]
        assert {p.dtype for p in towers} == {torch.bfloat16}


def test_scale_and_bias_come_back_bit_for_bit(section, tmp_path):
    model = load_model(section, LORA, image_size=56)
    with torch.no_grad():
        model.logit_scale.fill_(4.7123457)
        model.logit_bias.fill_(-12.912345)
    record = SavedRecord(family="siglip", base="x", revision=None)
    record.model_copy(update=scale_and_bias_record(model)).write(tmp_path)
    other = load_model(section, LORA, image_size=56)
    assert not torch.equal(other.logit_scale, model.logit_scale)
    for dtype in (torch.float32, torch.bfloat16):  # a base may be stored in either
        restore_scale_and_bias(other.to(dtype), SavedRecord.read(tmp_path))
        assert torch.equal(other.logit_scale, model.logit_scale)
        assert torch.equal(other.logit_bias, model.logit_bias)
    record.write(tmp_path)
    with pytest.raises(BaseModelError, match="they are missing"):
        restore_scale_and_bias(other, SavedRecord.read(tmp_path))
