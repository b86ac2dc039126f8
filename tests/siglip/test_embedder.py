"""Embeddings of a trained SigLIP are those of plain transformers."""

import json
import shutil

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModel, AutoProcessor

from medft.data.messages import first_texts
from medft.data.rows import Row, load_rows
from medft.siglip.embedder import Embedder
from medft.siglip.model import resize_positions


def test_embeddings_are_those_of_plain_transformers(embedder, runs, bases, images):
    base = AutoModel.from_pretrained(bases / "siglip")
    resize_positions(base, 84)
    model = PeftModel.from_pretrained(base, runs / "siglip" / "adapter").eval()
    processor = AutoProcessor.from_pretrained(runs / "siglip" / "adapter", backend="pil")
    images = [Image.open(path).convert("RGB") for path in images[:11]]
    texts = ["Normal knee radiograph.", "one cyst"]
    batch = processor(images=images, text=texts, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        outputs = model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"])
    # float32 sums over other batch sizes: a few roundings of 6e-8
    assert np.allclose(embedder.embed_images(images), outputs.image_embeds.numpy(), atol=2e-6)
    assert np.allclose(embedder.embed_texts(texts), outputs.text_embeds.numpy(), atol=2e-6)
    with embedder.without_adapter():
        base_rows = embedder.embed_images(images)
    assert np.abs(base_rows - outputs.image_embeds.numpy()).max() > 1e-3


def test_captions_are_made_as_in_training(runs, data, tmp_path):
    row = load_rows(data / "chat" / "train.jsonl", split="train")[0]
    texts = first_texts(Row.of(row).messages)
    assert Embedder.load(runs / "siglip").caption_of(Row.of(row)) == texts["answer"]
    adapter = tmp_path / "adapter"
    shutil.copytree(runs / "siglip" / "adapter", adapter)
    notes = json.loads((adapter / "medft.json").read_text())
    (adapter / "medft.json").write_text(json.dumps({**notes, "caption": "{question} {answer}"}))
    expected = f"{texts['question']} {texts['answer']}"
    assert Embedder.load(adapter).caption_of(Row.of(row)) == expected
