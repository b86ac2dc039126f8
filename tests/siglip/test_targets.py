"""Adapters in the pooling head live and merge; a tower without adapter runs once, without grad."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from siglip_steps import build_trainer, first_step
from transformers import AutoModel

from medft.config.lora_keys import SiglipLoraSection
from medft.config.recipe import ModelSection
from medft.errors import BaseModelError
from medft.export.merge import merge
from medft.models.lora import attach_adapter
from medft.siglip.embedder import Embedder
from medft.siglip.model import PRESETS, embed, load_model
from medft.siglip.pooling_head import join_pooling_head, split_pooling_head

HEAD = "vision_model.head.attention"


@pytest.fixture
def section(bases):
    return ModelSection(base=str(bases / "siglip"), dtype="float32")


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(8)
    return (
        torch.randint(3, 200, (5, 64), generator=generator),
        torch.randn(5, 3, 84, 84, generator=generator),
    )


def unit(embeddings):
    return torch.nn.functional.normalize(embeddings, dim=-1)


@pytest.mark.parametrize(
    ("preset", "layers"),
    [("text", 12), ("vision_no_head", 12), ("both_no_head", 24), ("vision", 18), ("both", 30)],
)
def test_presets_name_the_layers_of_the_architecture(section, preset, layers):
    lora = SiglipLoraSection(targets=preset)
    model = load_model(section, lora, image_size=84)
    adapted = attach_adapter(model, lora, PRESETS, task_type=None, seed=5)
    names = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    assert len(names) == layers
    assert sum(f"{HEAD}." in name for name in names) == (4 if preset in ("vision", "both") else 0)


def test_the_split_head_computes_what_the_stock_one_does_and_joins_to_it_again(section, batch):
    stock = AutoModel.from_pretrained(section.base)
    before = {name: weight.clone() for name, weight in stock.state_dict().items()}
    pixels = batch[1][..., :56, :56]
    with torch.no_grad():
        expected = stock.vision_model(pixels).pooler_output
        split_pooling_head(stock)
        found = stock.vision_model(pixels).pooler_output
        assert "vision_model.head.attention.q_proj.weight" in stock.state_dict()
        # another order of summation in fp32
        assert (found - expected).norm() <= 1e-6 * expected.norm()
        stock.vision_model.head.attention.k_proj.weight.mul_(2)
        assert (stock.vision_model(pixels).pooler_output - expected).norm() > 1e-4 * expected.norm()
        stock.vision_model.head.attention.k_proj.weight.div_(2)
    join_pooling_head(stock)
    after = stock.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(stock.vision_model(pixels).pooler_output, expected)


def test_an_adapter_on_the_stock_head_never_runs_and_on_the_split_one_does(section, batch):
    def without_gradient(model):
        torch.manual_seed(0)
        images, texts = embed(model, *batch)
        (unit(images) @ unit(texts).T).sum().backward()
        trained = [(n, p) for n, p in model.named_parameters() if "lora_B" in n]
        return [name for name, parameter in trained if parameter.grad is None]

    lora = SiglipLoraSection(targets=["out_proj"])
    stock = load_model(section, lora, image_size=84)
    trapped = get_peft_model(stock, LoraConfig(target_modules=["out_proj"]))
    assert without_gradient(trapped) == [f"base_model.model.{HEAD}.out_proj.lora_B.default.weight"]
    with pytest.raises(BaseModelError, match=r"preset that splits it \(SigLIP: vision, both\)"):
        attach_adapter(
            load_model(section, lora, image_size=84), lora, PRESETS, task_type=None, seed=5
        )

    both = SiglipLoraSection(targets="both")
    model = load_model(section, both, image_size=84)
    assert without_gradient(attach_adapter(model, both, PRESETS, task_type=None, seed=5)) == []


def test_an_adapter_with_head_is_saved_loaded_and_merged(
    sections, write_recipe, run_script, batch, tmp_path
):
    recipe = sections("siglip")
    recipe["lora"]["targets"] = "both"
    recipe["train"] |= {"max_steps": 4, "gradient_accumulation_steps": 2, "learning_rate": 3e-3}
    file = write_recipe(recipe)
    run_script("siglip", file)
    run = tmp_path / "run"
    notes = json.loads((run / "adapter" / "medft.json").read_text())
    assert notes["splits_head"] is True
    merge(run, tmp_path / "merged")

    trained = Embedder.load(run).model
    merged = AutoModel.from_pretrained(tmp_path / "merged").eval()
    base = AutoModel.from_pretrained(recipe["model"]["base"]).eval()
    assert isinstance(merged.vision_model.head.attention, torch.nn.MultiheadAttention)
    assert merged.logit_scale.item() == notes["logit_scale"] != base.logit_scale.item()
    with torch.no_grad():
        both = [embed(model, *batch) for model in (trained, merged)]
        untouched = base.text_model(batch[0]).pooler_output
    for left, right in zip(*both, strict=True):
        assert (unit(left) - unit(right)).abs().max() <= 1e-6  # fp32, another order of sums
    assert (unit(both[0][1]) - unit(untouched)).abs().max() > 1e-3
    weights = {n: p for n, p in PeftModel.named_parameters(trained) if "lora_B" in n}
    assert len(weights) == 30
    assert all(weight.any() for weight in weights.values())


@pytest.fixture
def locked(sections, write_recipe):
    """A recipe file that trains the text tower only, or both."""

    def write(targets, name):
        recipe = sections("siglip")
        recipe["data"]["validation"] = None
        recipe["lora"] |= {"targets": targets, "dropout": 0.3, "init_lora_weights": "gaussian"}
        recipe["train"] |= {
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 4,
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        }
        return write_recipe(recipe, name)

    return write


def test_a_locked_tower_runs_once_and_without_grad(locked):
    file = locked("text", "lit")
    trainer = build_trainer(file)
    tower = trainer.model.get_base_model().vision_model
    passes = []
    tower.encoder.register_forward_hook(
        lambda module, args, output: passes.append(output.last_hidden_state.requires_grad)
    )
    trainer.args.max_steps = 1
    trainer.train()
    assert passes == [False] * 4  # 4 micro-batches, not 8
    assert trainer._locked.parts == ["vision"]

    both = build_trainer(locked("both_no_head", "both"))
    assert both._locked.parts == []
    passes.clear()
    both.model.get_base_model().vision_model.encoder.register_forward_hook(
        lambda module, args, output: passes.append(output.last_hidden_state.requires_grad)
    )
    both.args.max_steps = 1
    both.train()
    assert passes == [False] * 4 + [True] * 4


def test_a_locked_tower_leaves_the_gradients_as_they_are(locked, monkeypatch):
    file = locked("text", "lit")
    _, found, logged = first_step(file)
    monkeypatch.setattr("medft.siglip.locked_towers.is_frozen", lambda tower: False)
    _, expected, as_stock = first_step(file)
    assert logged["loss"] == pytest.approx(as_stock["loss"], rel=1e-6)
    assert found.keys() == expected.keys()
    assert not any("vision_model" in name for name in found)
    for name, gradient in found.items():
        # the bits are equal: the same operations on the same numbers
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.upstream
def test_stock_code_trains_through_a_locked_tower(section, batch):
    lora = LoraConfig(target_modules=r"text_model\..*\.(q_proj|v_proj)")
    model = get_peft_model(load_model(section, None, image_size=84), lora)
    model.enable_input_require_grads()  # as Trainer does for PEFT with gradient checkpointing
    images, _ = embed(model, *batch)
    assert images.requires_grad
