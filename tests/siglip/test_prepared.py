"""What an encoder is trained on: captions, augmentation from a seed, SigLIP 2's tokenizer."""

import json
import shutil

import numpy as np
import pytest
import torch
from gemma_bases import gemma_tokenizer
from PIL import Image
from siglip_steps import build_trainer
from transformers import AutoModel, AutoProcessor, SiglipImageProcessorPil, SiglipProcessor

from medft.config.recipe import ModelSection, SiglipDataSection
from medft.errors import MedftError
from medft.siglip.augmentation import augment
from medft.siglip.embedder import Embedder
from medft.siglip.model import load_siglip_processor


@pytest.fixture
def image():
    """A gradient from left to right with a bright corner, so that every change shows."""
    gray = np.tile(np.linspace(20, 200, 80, dtype=np.uint8), (60, 1))
    gray[:10, :10] = 250
    return Image.fromarray(np.stack([gray] * 3, axis=-1))


def section(**changes):
    return SiglipDataSection(train="x", **changes)


def test_nothing_is_changed_unless_asked(image):
    assert augment(image, section(), (1, 2, 3)).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    "changes",
    [{"random_rotation": 10}, {"random_crop": 0.8}, {"random_brightness": 0.3}],
)
def test_changes_are_drawn_from_seed_epoch_and_entry(image, changes):
    first = augment(image, section(**changes), (17, 0, 5))
    assert augment(image, section(**changes), (17, 0, 5)).tobytes() == first.tobytes()
    for other in ((18, 0, 5), (17, 1, 5), (17, 0, 6)):
        assert augment(image, section(**changes), other).tobytes() != first.tobytes()


def test_a_crop_keeps_its_share_of_each_side(image):
    sizes = [augment(image, section(random_crop=0.7), (0, 0, i)).size for i in range(200)]
    widths, heights = zip(*sizes, strict=True)
    assert 56 <= min(widths) < 60
    assert 76 < max(widths) <= 80
    assert all(abs(w / 80 - h / 60) < 0.02 for w, h in zip(widths, heights, strict=True))


def test_brightness_stays_within_its_share(image):
    gray = [
        np.asarray(augment(image, section(random_brightness=0.2), (0, 0, i)))[30, 40, 0]
        for i in range(200)
    ]
    before = np.asarray(image)[30, 40, 0]
    assert 0.79 * before < min(gray) < 0.85 * before
    assert 1.15 * before < max(gray) < 1.21 * before


def test_left_and_right_are_swapped_only_when_asked(image):
    everything = {"random_rotation": 10, "random_crop": 0.8, "random_brightness": 0.2}

    def mirrored(**flip):
        found = 0
        for i in range(60):
            gray = np.asarray(augment(image, section(**everything, **flip), (0, 0, i)))[..., 0]
            found += gray[20:40, 15:20].mean() > gray[20:40, -20:-15].mean()
        return found

    assert mirrored() == 0
    assert 15 < mirrored(random_flip=True) < 45


def test_only_training_images_change_and_differently_in_each_epoch(sections, write_recipe):
    recipe = sections("siglip")
    recipe["data"] |= {"random_rotation": 5, "random_crop": 0.9, "random_brightness": 0.1}
    trainer = build_trainer(write_recipe(recipe))
    train, validation = trainer.train_dataset, trainer.eval_dataset
    first = train[3].image.tobytes()
    kept = validation[1].image.tobytes()
    assert train[3].image.tobytes() == first
    train.set_epoch(1)
    assert train[3].image.tobytes() != first
    assert validation[1].image.tobytes() == kept
    train.set_epoch(0)
    assert train[3].image.tobytes() == first


def test_workers_that_live_on_see_the_new_epoch(sections, write_recipe):
    recipe = sections("siglip")
    recipe["data"] |= {"random_brightness": 0.4}
    recipe["train"] |= {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = build_trainer(write_recipe(recipe))
    loader = torch.utils.data.DataLoader(
        trainer.train_dataset,
        batch_size=4,
        num_workers=1,
        persistent_workers=True,
        collate_fn=trainer.data_collator,
    )
    epochs = []
    for epoch in range(2):
        trainer.train_dataset.set_epoch(epoch)
        epochs.append(next(iter(loader))["pixel_values"])
    assert not torch.equal(*epochs)
    trainer.train_dataset.set_epoch(0)
    assert torch.equal(next(iter(loader))["pixel_values"], epochs[0])


def test_a_row_with_two_images_gives_a_pair_each_in_one_group(mixed_rows, sections, write_recipe):
    recipe = sections("siglip")
    recipe["data"]["train"] = str(mixed_rows)
    trainer = build_trainer(write_recipe(recipe))
    pairs = trainer.train_dataset
    assert len(pairs) == 15 + 2 * 7  # 5 rows have no image
    left, right = pairs[15], pairs[16]
    assert (left.id, left.group_id, left.caption) == (
        right.id, right.group_id, right.caption,
    )  # fmt: skip
    batch = trainer.data_collator([left, right])
    assert batch["group_ids"][0] == batch["group_ids"][1]


def test_pairs_parquet_gives_the_same_pairs_as_the_chat_file(data, sections, write_recipe):
    recipe = sections("siglip")
    chat = build_trainer(write_recipe(recipe)).train_dataset
    recipe["data"]["train"] = recipe["data"]["validation"] = str(data / "pairs.parquet")
    parquet = build_trainer(write_recipe(recipe, "parquet")).train_dataset
    assert len(parquet) == len(chat) > 20

    def content(pairs):
        return {
            (e.id, e.caption, e.image.tobytes()) for e in map(pairs.__getitem__, range(len(pairs)))
        }

    assert content(parquet) == content(chat)
    assert len(set(parquet.image_keys)) == len(set(chat.image_keys))


@pytest.fixture
def siglip2(bases, tmp_path):
    """A base as SigLIP 2 of fixed resolution is released: SigLIP with Gemma's tokenizer."""
    folder = tmp_path / "siglip2"
    shutil.copytree(bases / "siglip", folder)
    (folder / "spiece.model").unlink()
    tokenizer = gemma_tokenizer(add_bos_token=False, add_eos_token=True, padding_side="left")
    image_processor = SiglipImageProcessorPil(
        size={"height": 56, "width": 56}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    SiglipProcessor(image_processor, tokenizer).save_pretrained(folder)
    model = AutoModel.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    return folder


def test_siglip_2_sees_lower_case_padded_behind_and_so_does_what_is_saved(siglip2, tmp_path):
    stock = AutoProcessor.from_pretrained(siglip2, backend="pil").tokenizer
    assert stock("No Effusion")["input_ids"] != stock("no effusion")["input_ids"]  # the trap
    processor = load_siglip_processor(ModelSection(base=str(siglip2)), image_size=84, max_length=64)
    processor.save_pretrained(tmp_path / "saved")
    again = AutoProcessor.from_pretrained(tmp_path / "saved", backend="pil")
    for tokenizer in (processor.tokenizer, again.tokenizer):
        upper, lower = (
            tokenizer(text, padding="max_length", max_length=64)["input_ids"]
            for text in ("No Effusion", "no effusion")
        )
        assert upper == lower
        assert lower[-1] == tokenizer.pad_token_id != lower[0]
        assert tokenizer.eos_token_id in lower
    assert again.image_processor.size["height"] == 84


def test_an_untouched_siglip_2_is_embedded_in_lower_case(siglip2):
    encoder = Embedder.load(siglip2)
    upper, lower = encoder.embed_texts(["No Effusion", "no effusion"])
    assert (upper == lower).all()


def test_a_sharded_siglip_is_refused(sections, write_recipe, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(MedftError, match="the launcher asks for FSDP"):
        build_trainer(write_recipe(sections("siglip")))


def test_a_base_without_pooling_head_is_refused(bases, sections, write_recipe, tmp_path):
    shutil.copytree(bases / "siglip", tmp_path / "headless")
    file = tmp_path / "headless" / "config.json"
    config = json.loads(file.read_text())
    config["vision_config"]["vision_use_head"] = False
    file.write_text(json.dumps(config))
    recipe = sections("siglip")
    recipe["model"]["base"] = str(tmp_path / "headless")
    with pytest.raises(MedftError, match=r"has a pooling head, that of model\.base has none"):
        build_trainer(write_recipe(recipe))


def test_siglip_2_trains(siglip2, sections, write_recipe):
    recipe = sections("siglip")
    recipe["model"]["base"] = str(siglip2)
    recipe["train"] |= {"max_steps": 2, "save_strategy": "no"}
    trainer = build_trainer(write_recipe(recipe))
    first = trainer.train_dataset.captions[0]
    trainer.train_dataset.captions[0] = first.upper()
    batch = trainer.data_collator([trainer.train_dataset[0]])
    trainer.train_dataset.captions[0] = first
    assert torch.equal(
        batch["input_ids"], trainer.data_collator([trainer.train_dataset[0]])["input_ids"]
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


def test_a_shorter_padding_is_told_and_saved(sections, write_recipe, tmp_path, caplog):
    recipe = sections("siglip")
    trainer = build_trainer(write_recipe(recipe))
    assert "captions are padded to" not in caplog.text
    recipe["data"]["max_length"] = 24
    trainer = build_trainer(write_recipe(recipe))
    assert (
        "captions are padded to 24 tokens and the base learned to pool the last of 64"
        in caplog.text
    )
    trainer.data_collator.processor.save_pretrained(tmp_path / "saved")
    again = AutoProcessor.from_pretrained(tmp_path / "saved", backend="pil")
    padded = again.tokenizer("no effusion", padding="max_length")["input_ids"]
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert len(padded) == batch["input_ids"].shape[1] == 24


def test_a_tokenizer_of_another_model_is_refused(siglip2, bases, sections, write_recipe):
    shutil.copy(bases / "siglip" / "model.safetensors", siglip2)
    shutil.copy(bases / "siglip" / "config.json", siglip2)
    recipe = sections("siglip")
    recipe["model"]["base"] = str(siglip2)
    with pytest.raises(MedftError, match="text embeddings of the base, a caption has"):
        build_trainer(write_recipe(recipe))


def test_a_naflex_model_is_refused(siglip2, sections, write_recipe):
    config = json.loads((siglip2 / "config.json").read_text())
    config["model_type"] = "siglip2"
    (siglip2 / "config.json").write_text(json.dumps(config))
    recipe = sections("siglip")
    recipe["model"]["base"] = str(siglip2)
    with pytest.raises(MedftError, match="SigLIP of fixed resolution"):
        build_trainer(write_recipe(recipe))
