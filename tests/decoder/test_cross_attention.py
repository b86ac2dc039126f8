"""Mllama's rows mix with their neighbours in stock code, and do not with the fix."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from medft.config.recipe import ModelSection
from medft.decoder.families.mllama import MLLAMA
from medft.decoder.generator import Generator
from medft.decoder.model import load_model

TILES, SIDE = 4, 56


@pytest.fixture
def model(bases):
    """Loads the base with or without the fix; its cross-attention gates stand open at 0.5."""

    def load(fix):
        section = ModelSection(base=str(bases / "decoder"), dtype="float32")
        loaded = load_model(section, MLLAMA, None, dtype="float32").eval()
        if fix:
            MLLAMA.isolate_rows(loaded)
        return loaded

    return load


def inputs(image_counts, seed=0):
    """Rows of eight tokens with their first images before token 3, padded to equally many."""
    generator = torch.Generator().manual_seed(seed)
    size, most = len(image_counts), max(*image_counts, 1)
    batch = {
        "input_ids": torch.randint(60, 200, (size, 8), generator=generator),
        "pixel_values": torch.randn(size, most, TILES, 3, SIDE, SIDE, generator=generator),
        "aspect_ratio_ids": torch.zeros(size, most, dtype=torch.long),
        "aspect_ratio_mask": torch.zeros(size, most, TILES, dtype=torch.long),
        "cross_attention_mask": torch.zeros(size, 8, most, TILES, dtype=torch.long),
    }
    batch["aspect_ratio_mask"][:, :, 0] = 1
    for row, count in enumerate(image_counts):
        batch["pixel_values"][row, count:] = 0
        batch["aspect_ratio_ids"][row, :count] = 1
        batch["cross_attention_mask"][row, 3:, :count, 0] = 1
    return batch


def first_row(batch, images):
    """The first row alone, with its own number of images; without pixels where it has none."""
    alone = {name: value[:1] for name, value in batch.items()}
    if images == 0:
        return {"input_ids": alone["input_ids"]}
    per_image = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    alone |= {name: alone[name][:, :images] for name in per_image}
    return alone | {"cross_attention_mask": alone["cross_attention_mask"][:, :, :images]}


@pytest.mark.parametrize("counts", [(0, 1), (0, 2, 1), (1, 2)])
def test_a_rows_logits_depend_on_its_neighbours_in_stock_code_only(model, counts):
    batch = inputs(counts)
    alone = first_row(batch, counts[0])
    gaps = {}
    for fix in (False, True):
        loaded = model(fix)
        with torch.no_grad():
            together, by_itself = loaded(**batch).logits[:1], loaded(**alone).logits
        gaps[fix] = (together - by_itself).abs().max().item()
    assert gaps[False] > 1e-3
    assert gaps[True] <= 1e-6


@pytest.mark.parametrize("fix", [False, True])
def test_padding_tiles_reach_the_tokens_before_the_image_in_stock_code_only(model, fix):
    loaded = model(fix)
    batch = first_row(inputs((1,)), 1)
    pixels = {name: batch.pop(name) for name in list(batch) if name not in _TEXT}
    with torch.no_grad():
        states = loaded.model.multi_modal_projector(
            loaded.model.vision_model(**pixels).last_hidden_state
        )
        changed = states.clone()
        changed[:, :, 1:] += 1  # tiles that no token may see
        logits = [
            loaded(**batch, cross_attention_states=s.flatten(0, 2)).logits[:, -1]
            for s in (states, changed)
        ]
    gap = (logits[0] - logits[1]).abs().max().item()
    assert gap <= 1e-6 if fix else gap > 1e-4


_TEXT = ("input_ids", "cross_attention_mask")


def test_without_the_fix_the_numerics_are_those_of_stock_transformers(model, bases):
    batch = inputs((1, 2))
    stock = AutoModelForImageTextToText.from_pretrained(bases / "decoder").eval()
    with torch.no_grad():
        assert torch.equal(model(False)(**batch).logits, stock(**batch).logits)
        assert not torch.equal(model(True)(**batch).logits, stock(**batch).logits)


def test_recomputed_layers_are_masked_too(model):
    gradients = []
    for checkpointing in (False, True):
        loaded = model(True).train()
        if checkpointing:
            loaded.gradient_checkpointing_enable({"use_reentrant": False})
        loaded(**inputs((0, 1)), labels=inputs((0, 1))["input_ids"]).loss.backward()
        weight = loaded.model.language_model.layers[1].cross_attn.o_proj.weight
        gradients.append(weight.grad)
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


def test_the_fix_is_noted_in_the_adapter_and_applied_in_generation(
    sections, write_recipe, run_script, tmp_path
):
    recipe = sections("decoder")
    recipe["model"]["cross_attention_fix"] = True
    recipe["train"] |= {"max_steps": 2}
    run_script("decoder", write_recipe(recipe))
    adapter = tmp_path / "run" / "adapter"
    notes = json.loads((adapter / "medft.json").read_text())
    assert notes["cross_attention_fix"] is True
    batch = inputs((1,))
    logits = {}
    for fixed in (True, False):
        (adapter / "medft.json").write_text(json.dumps({**notes, "cross_attention_fix": fixed}))
        with torch.no_grad():
            logits[fixed] = Generator.load(adapter).model(**batch).logits
    assert not torch.equal(logits[True], logits[False])
    assert AutoProcessor.from_pretrained(adapter, backend="pil").image_token_id == 512
