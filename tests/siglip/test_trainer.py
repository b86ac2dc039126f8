"""The contrastive trainer against transformers' own loss; scale, bias and captions as released."""

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModel, AutoProcessor, set_seed

from medft.adapters import attach_adapter
from medft.errors import MedftError
from medft.recipe import SiglipRecipe
from medft.siglip.inputs import prepare_inputs
from medft.siglip.model import PRESETS, load_model, scale_and_bias, train_scale_and_bias
from medft.siglip.trainer import SiglipTrainer, siglip_arguments


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(True)


@pytest.fixture
def trainer(sections, write_recipe):
    def make(changes=(), **train):
        recipe = sections("siglip")
        recipe["train"] |= {"max_steps": 1, "save_strategy": "no", **train}
        recipe = SiglipRecipe.load(write_recipe(recipe), changes)
        set_seed(3)
        arguments = siglip_arguments(recipe.train, dtype="float32")
        inputs = prepare_inputs(
            recipe.model, recipe.data, recipe.lora, recipe.contrastive, arguments
        )
        model = load_model(recipe.model, recipe.lora, image_size=recipe.data.image_size)
        model = attach_adapter(model, recipe.lora, PRESETS, task_type=None)
        train_scale_and_bias(model)
        return SiglipTrainer(model, arguments, inputs, recipe.contrastive, {})

    return make


def test_the_step_0_loss_is_transformers_own(bases, trainer):
    trained = trainer(("contrastive.positives=diagonal", "data.image_size=56"))
    entries = [trained.train_dataset[index] for index in range(7)]
    inputs = trained._prepare_inputs(trained.data_collator(entries))
    loss = trained.compute_loss(trained.model, inputs)

    processor = AutoProcessor.from_pretrained(bases / "siglip", backend="pil")
    images = [entry["image"] for entry in entries]
    batch = processor(
        text=[entry["caption"] for entry in entries], images=images, padding="max_length",
        max_length=64, return_tensors="pt",
    )  # fmt: skip
    stock = AutoModel.from_pretrained(bases / "siglip")
    with torch.no_grad():
        expected = stock(
            input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], return_loss=True
        ).loss
        short = processor(
            text=[entry["caption"] for entry in entries], images=images, padding=True,
            return_tensors="pt",
        )  # fmt: skip
        unpadded = stock(
            input_ids=short["input_ids"], pixel_values=short["pixel_values"], return_loss=True
        ).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert abs(unpadded.item() - loss.item()) > 1e-5  # the trap: padding=True


def test_captions_are_padded_to_64_and_have_no_mask(trainer):
    trained = trainer()
    batch = trained.data_collator([trained.train_dataset[index] for index in range(3)])
    assert batch.keys() == {"input_ids", "pixel_values", "group_ids", "row_ids"}
    assert batch["input_ids"].shape == (3, 64)
    assert (batch["input_ids"][:, -1] == 1).all()
    assert batch["pixel_values"].shape == (3, 3, 84, 84)


def test_scale_and_bias_have_a_group_without_decay_at_their_own_rate(trainer):
    trained = trainer(("contrastive.scale_lr=3.0", "train.weight_decay=0.2"))
    own = {id(p) for p in scale_and_bias(trained.model)}
    groups = trained.create_optimizer().param_groups
    [group] = [g for g in groups if any(id(p) in own for p in g["params"])]
    assert {id(p) for p in group["params"]} == own
    assert group["weight_decay"] == 0
    assert group["lr"] == pytest.approx(3e-2)
    counted = [id(p) for g in groups for p in g["params"]]
    assert len(counted) == len(set(counted))
    assert set(counted) == {id(p) for p in trained.model.parameters() if p.requires_grad}
    assert any(g["weight_decay"] == 0.2 for g in groups)


def test_training_moves_adapter_scale_and_bias_alone(trainer):
    trained = trainer(max_steps=3)
    before = {name: p.detach().clone() for name, p in trained.model.named_parameters()}
    trained.train()
    for name, parameter in trained.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    assert sum(p.requires_grad for p in scale_and_bias(trained.model)) == 2
    logged = trained.state.log_history[0]
    assert {"loss", "scale", "bias", "grad_norm"} <= logged.keys()


def test_validation_sees_the_split_as_one_batch(trainer):
    small, large = (trainer(per_device_eval_batch_size=size) for size in (1, 3))
    first, second = small.evaluate(), large.evaluate()
    assert first["eval_loss"] == pytest.approx(second["eval_loss"], rel=1e-6)
    entries = list(large.eval_dataset)
    whole = large._prepare_inputs(large.data_collator(entries))
    with torch.no_grad():
        expected = large.compute_loss(large.model.eval(), whole).item()
    assert first["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert first["eval_pool"] == len(entries)


def test_accumulation_is_not_taken_for_a_larger_batch(trainer):
    with pytest.raises(MedftError, match="exact_batch with one process and no accumulation"):
        trainer(gradient_accumulation_steps=2)
    changes = ("contrastive.exact_batch=false", "lora.dropout=0")
    plain = trainer(changes, gradient_accumulation_steps=2)
    batches = list(plain.get_train_dataloader())[:2]
    with torch.no_grad():
        losses = [plain.compute_loss(plain.model.train(), b).item() for b in batches]
    plain.train()
    assert plain.state.log_history[0]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.max_length=65", "at most 64"),
        ("data.image_size=7", "at least one patch"),
        ('data.caption="{answer} {nothing}"', "nothing is none in row"),
    ],
)
def test_what_cannot_work_is_an_error_before_loading(trainer, change, message):
    with pytest.raises(MedftError, match=message):
        trainer((change,))


def test_a_decoder_is_no_encoder(trainer, bases):
    with pytest.raises(MedftError, match=r"decoder_qlora\.py"):
        trainer((f"model.base={bases / 'decoder'}",))


def test_a_caption_template_fills_from_the_row(trainer):
    trained = trainer(('data.caption="Q {question} A {answer}"',))
    assert trained.train_dataset[0]["caption"].startswith("Q ")
    assert " A " in trained.train_dataset[0]["caption"]
