"""A tower without trainable weights has no backward pass, and the gradients stay what they were."""

import pytest
import torch
from families import BASES, FAMILY
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForImageTextToText

from medft.decoder.families import FAMILIES
from medft.decoder.frozen_tower import run_frozen_parts_without_grad
from medft.errors import BaseModelError

REENTRANT = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": True},
}


@pytest.fixture
def trainer(sections, write_recipe, bases, build_trainer):
    def make(family, changes=(), **train):
        recipe = sections("decoder")
        recipe["model"]["base"] = str(bases / BASES[family])
        recipe["data"]["validation"] = None
        recipe["lora"]["dropout"] = 0.0
        recipe["train"] |= {"max_steps": 2, "save_strategy": "no", **train}
        return build_trainer(write_recipe(recipe), changes)

    return make


def saved_by_tower(model, family, step):
    """Bytes that the tower's forward keeps for a backward pass during a step."""
    tower = model.get_base_model().get_submodule(FAMILIES[family].parts["vision"])
    inside, kept = [], []
    handles = [
        tower.register_forward_pre_hook(lambda *_: inside.append(True)),
        tower.register_forward_hook(lambda *_: inside.clear()),
    ]

    def pack(tensor):
        if inside:
            kept.append(tensor.nbytes)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    for handle in handles:
        handle.remove()
    return sum(kept)


def stock_loss(bases, family, made, *, reentrant):
    """A step of the same rows in stock transformers with PEFT and checkpointing."""
    model = AutoModelForImageTextToText.from_pretrained(bases / BASES[family])
    config = LoraConfig(r=4, lora_alpha=8, target_modules=FAMILIES[family].presets["language"])
    model = get_peft_model(model, config).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    batch = made.data_collator([made.train_dataset[0], made.train_dataset[1]])
    del batch["row_ids"]
    batch |= FAMILIES[family].stack_images([[image] for image in batch.pop("images")])
    return model, lambda: model(**batch).loss.backward()


@FAMILY
def test_the_tower_keeps_nothing_for_a_backward_pass_where_stock_code_does(bases, trainer, family):
    made = trainer(family, gradient_checkpointing=True)
    made.train()
    batch = made.to_device(made.data_collator([made.train_dataset[0], made.train_dataset[1]]))
    made.model.train()
    kept = saved_by_tower(
        made.model, family, lambda: made.compute_loss(made.model, batch).backward()
    )
    assert kept == 0
    stock, step = stock_loss(bases, family, made, reentrant=False)
    assert saved_by_tower(stock, family, step) > 0


@pytest.mark.parametrize("quantization", ["null", "{bits: 4}"])
@FAMILY
@pytest.mark.slow
def test_reentrant_checkpointing_trains_what_the_other_kind_trains(trainer, family, quantization):
    changes = [f"quantization={quantization}"]
    logs = []
    for options in ({"gradient_checkpointing": True}, REENTRANT, {}):
        made = trainer(family, changes, **options)
        made.train()
        logs.append([(e["loss"], e["grad_norm"]) for e in made.state.log_history if "loss" in e])
    assert logs[0] == logs[1] == logs[2]


@pytest.mark.upstream
def test_reentrant_checkpointing_fails_in_stock_code(bases, trainer):
    _, step = stock_loss(bases, "mllama", trainer("mllama"), reentrant=True)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        step()


@pytest.mark.parametrize(
    ("targets", "frozen"),
    [("language", ["vision", "projector"]), ("projector", ["vision"]), ("vision", []), ("all", [])],
)
def test_only_what_stands_before_every_trained_weight_is_frozen(bases, trainer, targets, frozen):
    made = trainer("mllama", [f"lora.targets={targets}"])
    base = made.model.get_base_model()
    batch = made.to_device(made.data_collator([made.train_dataset[0]]))
    outputs = {}
    for part in ("vision", "projector"):
        module = base.get_submodule(FAMILIES["mllama"].parts[part])
        module.register_forward_hook(lambda m, a, o, part=part: outputs.update({part: o}))
    made.compute_loss(made.model, batch).backward()
    needs = {part: (o if torch.is_tensor(o) else o[0]).requires_grad for part, o in outputs.items()}
    assert [part for part, grad in needs.items() if not grad] == frozen
    trained = [p for p in made.model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)


def test_an_output_that_requires_grad_again_is_an_error(bases, trainer):
    made = trainer("mllama")
    base = made.model.get_base_model()

    def meddle(module, args, output):
        output.last_hidden_state.requires_grad_(True)

    base.model.vision_model.register_forward_hook(meddle)
    run_frozen_parts_without_grad(base, FAMILIES["mllama"])
    batch = made.to_device(made.data_collator([made.train_dataset[0]]))
    with pytest.raises(BaseModelError, match="expected the frozen vision to run without grad"):
        made.compute_loss(made.model, batch)
