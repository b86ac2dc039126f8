"""The base that an evaluation compares with is the one that plain transformers loads."""

import json
import shutil

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText

from medft.decoder.generator import Generator
from medft.models.saved import RECORD_FILE, find_saved_model
from medft.siglip.embedder import Embedder


def decoder_batch():
    """A row of eight tokens, the first three of which see no image."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.zeros(1, 8, 1, 4, dtype=torch.long)
    mask[0, 3:, 0, 0] = 1
    return {
        "input_ids": torch.randint(60, 200, (1, 8), generator=generator),
        "pixel_values": torch.randn(1, 1, 4, 3, 56, 56, generator=generator),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0]]]),
        "cross_attention_mask": mask,
    }


@pytest.mark.parametrize("has_fix", [False, True])
def test_a_decoders_base_is_plain_transformers_own(runs, bases, tmp_path, has_fix):
    adapter = shutil.copytree(runs / "decoder" / "adapter", tmp_path / "adapter")
    record = json.loads((adapter / RECORD_FILE).read_text()) | {"cross_attention_fix": has_fix}
    (adapter / RECORD_FILE).write_text(json.dumps(record))
    generator = Generator.of(find_saved_model(adapter))
    fresh = AutoModelForImageTextToText.from_pretrained(bases / "decoder").eval()
    with torch.no_grad():
        expected, tuned = (m(**decoder_batch()).logits for m in (fresh, generator.model))
        with generator.without_adapter():
            base = generator.model(**decoder_batch()).logits
        assert torch.equal(base, expected)
        assert (tuned - expected).abs().max() > 1e-3
        assert torch.equal(generator.model(**decoder_batch()).logits, tuned)


def test_a_decoders_base_without_the_adapter_alone_would_still_have_the_fix(runs, bases, tmp_path):
    adapter = shutil.copytree(runs / "decoder" / "adapter", tmp_path / "adapter")
    record = json.loads((adapter / RECORD_FILE).read_text()) | {"cross_attention_fix": True}
    (adapter / RECORD_FILE).write_text(json.dumps(record))
    model = Generator.of(find_saved_model(adapter)).model
    fresh = AutoModelForImageTextToText.from_pretrained(bases / "decoder").eval()
    with torch.no_grad(), model.disable_adapter():
        gap = (model(**decoder_batch()).logits - fresh(**decoder_batch()).logits).abs().max()
    assert gap > 1e-3


def siglip_logits(model, **options):
    generator = torch.Generator().manual_seed(8)
    pixels = torch.randn(3, 3, 84, 84, generator=generator)
    ids = torch.randint(3, 200, (5, 64), generator=generator)
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels, **options).logits_per_image


def test_a_siglips_base_has_its_own_scale_and_bias(runs, bases):
    saved = find_saved_model(runs / "siglip")
    assert saved.record.image_size == 84
    model = Embedder.of(saved).model
    fresh = AutoModel.from_pretrained(bases / "siglip").eval()
    expected = siglip_logits(fresh, interpolate_pos_encoding=True)
    tuned = siglip_logits(model)
    embedder = Embedder.of(saved)
    with embedder.without_adapter():
        base = siglip_logits(embedder.model)
    # positions are interpolated once, not on each forward: roundings of 6e-8 of a logit of 10
    assert torch.allclose(base, expected, rtol=1e-6, atol=1e-5)
    assert torch.equal(siglip_logits(embedder.model), tuned)
    with model.disable_adapter():
        assert (siglip_logits(model) - expected).abs().max() > 1e-3  # trained scale and bias


@pytest.mark.slow
@pytest.mark.parametrize("key", ["init_from", "targets"])
def test_the_base_of_a_continued_adapter_and_of_one_on_the_head_is_untouched(
    runs, bases, sections, write_recipe, run_script, tmp_path, key
):
    recipe = sections("siglip")
    recipe["lora"] |= {"init_from": str(runs / "siglip")} if key == "init_from" else {key: "both"}
    recipe["train"] |= {"max_steps": 2}
    run_script("siglip", write_recipe(recipe))
    saved = find_saved_model(tmp_path / "run")
    assert saved.record.splits_head == (key == "targets")
    embedder = Embedder.of(saved)
    fresh = AutoModel.from_pretrained(bases / "siglip").eval()
    with embedder.without_adapter():
        base = siglip_logits(embedder.model)
    expected = siglip_logits(fresh, interpolate_pos_encoding=True)
    assert torch.allclose(base, expected, rtol=1e-6, atol=1e-5)
    assert (siglip_logits(embedder.model) - expected).abs().max() > 1e-3
