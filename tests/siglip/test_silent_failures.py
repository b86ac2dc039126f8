"""Ways in which contrastive training goes wrong in stock code, each shown, and medft's answer."""

import json
import math

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from siglip_steps import Gradients, build_trainer
from torch.utils.data import BatchSampler
from transformers import AutoModel, SiglipConfig, SiglipModel, Trainer, TrainingArguments

from medft.config.lora_keys import SiglipLoraSection
from medft.config.recipe import ModelSection
from medft.errors import BaseModelError
from medft.siglip.loss import Labels, sigmoid_loss
from medft.siglip.model import load_model


@pytest.fixture
def pairs():
    """16 pairs of random pixels and tokens, as a stock dataset."""
    generator = torch.Generator().manual_seed(6)
    pixels = torch.randn(16, 3, 56, 56, generator=generator)
    ids = torch.randint(3, 200, (16, 64), generator=generator)
    return [{"pixel_values": p, "input_ids": i} for p, i in zip(pixels, ids, strict=True)]


def collated(entries):
    batch = {key: torch.stack([entry[key] for entry in entries]) for key in entries[0]}
    return {**batch, "return_loss": True}


def stock_step(model, pairs, folder, collate=collated, *, per_device, accumulation):
    """The gradient of a step of transformers' own Trainer with SigLIP's own loss."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        max_grad_norm=0,
        use_cpu=True,
        report_to="none",
        remove_unused_columns=False,
        save_strategy="no",
    )
    callback = Gradients()
    Trainer(
        model, arguments, train_dataset=pairs, data_collator=collate, callbacks=[callback]
    ).train()
    return torch.cat([gradient.flatten() for gradient in callback.found.values()])


@pytest.mark.upstream
def test_1_stock_accumulation_has_the_negatives_of_a_micro_batch_only(bases, pairs, tmp_path):
    def gradient(size):
        model = AutoModel.from_pretrained(bases / "siglip")
        torch.nn.init.constant_(model.logit_bias, -1)  # where negatives weigh
        return stock_step(model, pairs, tmp_path, per_device=size, accumulation=16 // size)

    whole, parts = gradient(16), gradient(4)
    assert (parts - whole).norm() > 0.3 * whole.norm()  # medft: test_trainer, relative 1e-5


@pytest.mark.upstream
def test_9_stock_does_not_divide_where_a_batch_has_a_key_called_labels(bases, pairs, tmp_path):
    def with_labels(entries):
        return {**collated(entries), "labels": torch.zeros(len(entries), dtype=torch.long)}

    class TakesLabels(SiglipModel):
        def forward(self, labels=None, num_items_in_batch=None, **inputs):
            return super().forward(**inputs)

    divided, not_divided = (
        stock_step(
            TakesLabels.from_pretrained(bases / "siglip"), pairs, tmp_path, collate,
            per_device=4, accumulation=4,
        )
        for collate in (collated, with_labels)
    )  # fmt: skip
    torch.testing.assert_close(not_divided, 4 * divided, rtol=1e-4, atol=1e-4)


@pytest.fixture
def nine_captions(tmp_path, sections, write_recipe):
    """A trainer on 63 images with 9 captions, seven times each, all in one batch."""

    def make(positives):
        rows = []
        for number in range(63):
            Image.new("RGB", (20, 20), (4 * number, 0, 0)).save(tmp_path / f"{number}.png")
            texts = ("What is it?", f"class {'abcdefghi'[number % 9]}")
            messages = [
                {"role": role, "content": text}
                for role, text in zip(("user", "assistant"), texts, strict=True)
            ]
            rows.append(json.dumps({"images": [f"{number}.png"], "messages": messages}))
        file = tmp_path / "nine.jsonl"
        file.write_text("\n".join(rows))
        recipe = sections("siglip")
        recipe["data"] |= {"train": str(file), "validation": None}
        recipe["train"]["per_device_train_batch_size"] = 63
        recipe["contrastive"]["positives"] = positives
        return build_trainer(write_recipe(recipe))

    return make


def perfect_embeddings():
    """[63, 9] of nine classes in turn: equal within a class, all other cosines -1 / 8."""
    corners = torch.eye(9, dtype=torch.float64) - 1 / 9
    corners = torch.nn.functional.normalize(corners, dim=-1)
    return corners[torch.arange(63) % 9]


def test_2_the_printed_floor_is_the_loss_of_perfect_embeddings(nine_captions):
    perfect, ids = perfect_embeddings(), torch.arange(63)[:, None] % 9
    # the best logit of equal captions, of which one in seven counts, and a far one for the others
    best, far = -math.log(6), -40.0
    t = (best - far) / (1 + 1 / 8)
    scale, bias = torch.tensor([math.log(t)]), torch.tensor([best - t])
    diagonal = Labels(ids, ids[:, 0], "diagonal").tile()
    reached = sigmoid_loss(perfect, perfect, diagonal, scale, bias).item()
    floor = nine_captions("diagonal")._plan.loss_floor
    assert floor == pytest.approx(reached, rel=1e-5)  # float32 logits
    assert floor == pytest.approx(math.log(7) + 6 * math.log(7 / 6), rel=1e-12)

    for moved in (best - 0.3, best + 0.3):  # nothing nearby is better
        t = (moved - far) / (1 + 1 / 8)
        scale, bias = torch.tensor([math.log(t)]), torch.tensor([moved - t])
        assert sigmoid_loss(perfect, perfect, diagonal, scale, bias).item() > reached + 0.01

    scale, bias = torch.tensor([math.log(60.0)]), torch.tensor([-30.0])
    caption = Labels(ids, ids[:, 0], "caption").tile()
    assert sigmoid_loss(perfect, perfect, caption, scale, bias).item() < 1e-6
    assert nine_captions("caption")._plan.loss_floor == 0


@pytest.mark.upstream
def test_4_stock_leaves_scale_and_bias_out_of_an_adapter_and_decays_them(bases, tmp_path):
    model = AutoModel.from_pretrained(bases / "siglip")
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["logit_scale", "logit_bias"])
    adapted = get_peft_model(model, lora)
    assert not model.logit_scale.requires_grad  # asked for, and frozen
    adapted.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("logit" in name for name in saved)
    arguments = TrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True)
    whole = AutoModel.from_pretrained(bases / "siglip")
    groups = Trainer(whole, arguments).create_optimizer().param_groups
    [group] = [g for g in groups if any(p is whole.logit_scale for p in g["params"])]
    assert group["weight_decay"] == 0.1


@pytest.fixture
def without_scale_and_bias(bases, tmp_path):
    """A base whose files lack both."""
    (tmp_path / "config.json").write_text((bases / "siglip" / "config.json").read_text())
    weights = load_file(bases / "siglip" / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "logit" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.mark.upstream
def test_5_stock_fills_in_zeros_for_scale_and_bias(bases, without_scale_and_bias):
    config = SiglipConfig.from_pretrained(bases / "siglip")
    assert SiglipModel(config).logit_scale.item() == SiglipModel(config).logit_bias.item() == 0
    assert AutoModel.from_pretrained(without_scale_and_bias).logit_scale.item() == 0


def test_5_a_base_without_scale_and_bias_is_refused(without_scale_and_bias):
    section = ModelSection(base=str(without_scale_and_bias), dtype="float32")
    with pytest.raises(BaseModelError, match="2 are missing or of another shape, first logit_bias"):
        load_model(section, SiglipLoraSection(), image_size=56)


def test_8_stock_logits_are_bfloat16_under_autocast(bases, pairs):
    model = AutoModel.from_pretrained(bases / "siglip")
    with torch.no_grad():
        model.logit_scale.fill_(math.log(117.0))
        model.logit_bias.fill_(-12.9)
        inputs = collated(pairs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            stock = model(**inputs)
        embedded = (stock.vision_model_output, stock.text_model_output)
        images, texts = (part.pooler_output for part in embedded)
        own = 2 * torch.eye(16) - 1
        ours = sigmoid_loss(images, texts, own, model.logit_scale, model.logit_bias)
        exact = torch.nn.functional.normalize(images.double(), dim=-1) @ (
            torch.nn.functional.normalize(texts.double(), dim=-1).T
        )
        logits = 117.0 * exact - 12.9
        expected = torch.nn.functional.softplus(-own * logits).sum() / 16
    assert (stock.logits_per_image.double() - logits).abs().max() > 0.05
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.upstream
def test_an_epochs_rest_is_repeated_by_accelerate():
    sampler = BatchSampler(range(10), batch_size=4, drop_last=False)
    shards = [BatchSamplerShard(sampler, 2, rank) for rank in range(2)]
    last = [list(shard)[-1] for shard in shards]
    seen = [index for batch in last for index in batch]
    assert len(seen) > len(set(seen)) or len(set(seen) & set(range(8))) > 0


def test_an_epochs_rest_is_dropped_by_medft(sections, write_recipe):
    recipe = sections("siglip")
    recipe["train"] |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = build_trainer(write_recipe(recipe))
    batches = list(trainer.get_train_dataloader())
    ids = [name for batch in batches for name in batch["row_ids"]]
    assert len(ids) == len(set(ids)) == len(trainer.train_dataset) // 8 * 8
    assert {len(batch["row_ids"]) for batch in batches} == {4}
