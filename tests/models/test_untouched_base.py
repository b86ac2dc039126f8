"""Without its adapter a model is its base to the last bit, whatever section lora says."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from medft.config.lora_keys import LoraSection, SiglipLoraSection
from medft.config.recipe import DecoderModelSection, QuantizationSection
from medft.decoder.families.mllama import MLLAMA
from medft.decoder.model import load_model
from medft.errors import RunError
from medft.models.adapter import load_adapter, without_adapter
from medft.models.lora import attach_adapter
from medft.siglip import model as siglip_model

OPTIONS = [
    {"r": 2, "alpha": 64, "dropout": 0.5, "targets": "all", "init_lora_weights": True},
    {"exclude_modules": r".*self_attn.*", "use_rslora": True, "rank_pattern": {"k_proj": 8}},
    {"exclude_modules": ["o_proj"], "alpha_pattern": {r"layers\.0\..*": 99}},
    {"targets": ["q_proj"], "layers_to_transform": 1, "init_lora_weights": "gaussian"},
    {"targets": ["fc1"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    {"use_dora": True, "targets": "all"},
    {"init_lora_weights": "orthogonal"},
    {"modules_to_save": ["lm_head", "multi_modal_projector", "embed_tokens", "layers.1.mlp"]},
    {"modules_to_save": ["vision_model.layernorm_post"], "use_dora": True, "targets": "vision"},
]


def test_every_key_of_lora_has_a_case():
    assert {key for case in OPTIONS for key in case} == LoraSection.model_fields.keys() - {
        "init_from"
    }


@pytest.fixture(scope="module")
def batch(bases):
    """Model inputs of one conversation with an image."""
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)
    processor = AutoProcessor.from_pretrained(bases / "decoder", backend="pil")
    turn = [{"type": "image"}, {"type": "text", "text": "What is seen?"}]
    text = processor.apply_chat_template([{"role": "user", "content": turn}])
    return dict(processor(images=[Image.fromarray(pixels)], text=text, return_tensors="pt"))


@torch.no_grad()
def logits(model, batch):
    return model.eval()(**batch).logits


def move(adapted):
    """Change everything that is trained."""
    torch.manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)


def decoder(bases):
    return AutoModelForImageTextToText.from_pretrained(bases / "decoder", dtype=torch.float32)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_decoder_without_its_adapter_is_its_base(bases, batch, tmp_path, options):
    base = logits(decoder(bases), batch)
    lora = LoraSection(**{"r": 4, "alpha": 8, **options})
    adapted = attach_adapter(decoder(bases), lora, MLLAMA.presets, task_type="CAUSAL_LM", seed=5)
    # orthogonal and DoRA multiply what cancels: float32
    assert (logits(adapted, batch) - base).abs().max() < 1e-4
    move(adapted)
    adapted.save_pretrained(tmp_path)
    tuned = logits(adapted, batch)
    assert (tuned - base).abs().max() > 1e-2
    loaded = load_adapter(decoder(bases), tmp_path)
    assert torch.equal(logits(loaded, batch), tuned)
    for model in (adapted, loaded):
        with without_adapter(model):
            assert torch.equal(logits(model, batch), base)
        assert torch.equal(logits(model, batch), tuned)


def test_a_4_bit_decoder_without_its_adapter_is_its_base(bases, batch):
    section = DecoderModelSection(base=str(bases / "decoder"), dtype="float32")

    def load():
        return load_model(section, MLLAMA, QuantizationSection(), dtype="float32")

    base = logits(load(), batch)
    lora = LoraSection(r=4, alpha=8, use_dora=True, modules_to_save=["lm_head"])
    adapted = attach_adapter(load(), lora, MLLAMA.presets, task_type="CAUSAL_LM", seed=5)
    move(adapted)
    assert (logits(adapted, batch) - base).abs().max() > 1e-2
    with without_adapter(adapted):
        assert torch.equal(logits(adapted, batch), base)


def siglip_batch(model):
    side = model.config.vision_config.image_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, side, side, generator=generator)
    tokens = model.config.text_config.max_position_embeddings
    return {"pixel_values": images, "input_ids": torch.arange(2 * tokens).view(2, tokens) % 50}


def siglip(bases):
    """The base, frozen: torch's MultiheadAttention sums in another order if a weight is not."""
    model = AutoModel.from_pretrained(bases / "siglip", dtype=torch.float32)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def embeddings(model, batch):
    return siglip_model.embed(model.eval(), batch["input_ids"], batch["pixel_values"])


def test_a_siglip_without_its_adapter_is_its_base(bases):
    batch = siglip_batch(siglip(bases))
    base = embeddings(siglip(bases), batch)
    lora = SiglipLoraSection(
        r=4, use_dora=True, modules_to_save=["post_layernorm", "text_model.head"]
    )
    adapted = attach_adapter(siglip(bases), lora, siglip_model.PRESETS, task_type=None, seed=5)
    move(adapted)
    for tuned, plain in zip(embeddings(adapted, batch), base, strict=True):
        assert (tuned - plain).abs().max() > 1e-2
    with without_adapter(adapted):
        for off, plain in zip(embeddings(adapted, batch), base, strict=True):
            assert torch.equal(off, plain)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
        ({"init_lora_weights": "olora"}, "init_lora_weights: olora"),
        ({"bias": "all"}, "bias: all"),
        ({"bias": "lora_only"}, "bias: lora_only"),
    ],
)
def test_an_adapter_that_changed_its_base_gives_no_base_but_merges(
    bases, tmp_path, settings, named
):
    batch = siglip_batch(siglip(bases))
    config = LoraConfig(r=4, target_modules=["q_proj", "fc1"], **settings)
    adapted = get_peft_model(siglip(bases), config)
    move(adapted)
    adapted.save_pretrained(tmp_path)
    loaded = load_adapter(siglip(bases), tmp_path)
    tuned, base = embeddings(loaded, batch), embeddings(siglip(bases), batch)
    with loaded.disable_adapter():  # the trap
        assert (embeddings(loaded, batch)[0] - base[0]).abs().max() > 1e-2
    with pytest.raises(RunError, match=f"this one has {named}, which changes the base"):
        without_adapter(loaded)
    merged = loaded.merge_and_unload(safe_merge=True)
    for left, right in zip(embeddings(merged, batch), tuned, strict=True):
        assert (left - right).abs().max() < 1e-4  # fp32, summed in another order
    assert isinstance(loaded, PeftModel)
