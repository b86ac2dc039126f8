"""Tiny bases have the shape of the released models where it matters."""

import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from medft.demo.bases import build_decoder, build_siglip
from medft.files import file_sha256


def test_the_decoders_image_token_lies_one_past_the_heads_rows(bases):
    model = AutoModelForImageTextToText.from_pretrained(bases / "decoder")
    processor = AutoProcessor.from_pretrained(bases / "decoder", backend="pil")
    token = processor.tokenizer.convert_tokens_to_ids("<|image|>")
    assert token == processor.image_token_id == model.config.image_token_index
    assert token == model.get_output_embeddings().out_features == 512
    assert model.get_input_embeddings().num_embeddings == 520
    assert len(processor.tokenizer) == 513
    assert processor.tokenizer.eos_token_id in model.generation_config.eos_token_id
    assert type(processor.image_processor).__name__ == "MllamaImageProcessorPil"


def test_the_decoder_sees_its_image(bases):
    model = AutoModelForImageTextToText.from_pretrained(bases / "decoder").eval()
    processor = AutoProcessor.from_pretrained(bases / "decoder", backend="pil")
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    )
    images = torch.randint(0, 255, (2, 60, 60, 3), dtype=torch.uint8).numpy()
    with torch.no_grad():
        logits = [
            model(**processor(images=[[image]], text=[text], return_tensors="pt")).logits
            for image in images
        ]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_the_decoder_generates_until_its_end_token(bases):
    model = AutoModelForImageTextToText.from_pretrained(bases / "decoder").eval()
    ids = torch.tensor([[504, 40, 41]])
    out = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert 4 <= out.shape[1] <= 8


def test_siglip_pads_with_its_end_token_and_has_a_learned_scale(bases):
    model = AutoModel.from_pretrained(bases / "siglip")
    processor = AutoProcessor.from_pretrained(bases / "siglip", backend="pil")
    assert processor.tokenizer.pad_token_id == 1
    assert model.config.text_config.max_position_embeddings == 64
    assert model.logit_scale.exp().item() > 9
    assert model.logit_bias.item() == -10
    ids = processor.tokenizer(["HER2+", "HER2-", "3.5 cm", "35 cm"])["input_ids"]
    assert ids[0] == ids[1]  # as in the release: punctuation is lost
    assert ids[2] == ids[3]
    assert type(processor.image_processor).__name__ == "SiglipImageProcessorPil"


def test_a_seed_draws_the_same_base_and_another_seed_another(tmp_path):
    def hashes(seed):
        build_decoder(tmp_path / f"d{seed}", seed=seed)
        build_siglip(tmp_path / f"s{seed}", seed=seed)
        return [file_sha256(tmp_path / f"{kind}{seed}" / "model.safetensors") for kind in "ds"]

    first, other = hashes(1), hashes(2)
    state = torch.random.get_rng_state()
    assert not set(first) & set(other)
    build_decoder(tmp_path / "again", seed=1)
    assert file_sha256(tmp_path / "again" / "model.safetensors") == first[0]
    assert torch.equal(torch.random.get_rng_state(), state)
