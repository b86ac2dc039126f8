"""The gradient of an encoder's first optimizer step, in this process or under torchrun.

torchrun --nproc_per_node 2 tests/siglip_steps.py RECIPE.yaml OUT.pt [section.key=value ...]
"""

import sys
from pathlib import Path

import torch
from transformers import TrainerCallback, set_seed

from medft.compat import reset_accelerator
from medft.config.recipe import SiglipRecipe
from medft.models.base import identify_base
from medft.siglip.build import build_trainer as build
from medft.siglip.prepared import prepare_siglip_data
from medft.siglip.trainer import siglip_arguments


def build_trainer(file, changes=(), **options):
    """A trainer as the script makes it, its adapter drawn from a seed.

    Where a recipe says gaussian, lora_B is random too, so that no gradient is zero.
    """
    reset_accelerator()
    recipe = SiglipRecipe.load(file, changes)
    lora = recipe.lora
    if lora and lora.init_lora_weights == "gaussian":
        lora = lora.model_copy(update={"init_lora_weights": False})
    set_seed(3)
    arguments = siglip_arguments(recipe.train, dtype=recipe.model.dtype)
    sections = recipe.model, recipe.data, lora, recipe.contrastive
    prepared = prepare_siglip_data(*sections, arguments)
    base = identify_base(recipe.model)
    return build(*sections, arguments=arguments, prepared=prepared, base=base, **options)


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step as the optimizer gets them."""

    def __init__(self):
        self.found = None

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        """Copy them once."""
        if self.found is None:
            self.found = {
                name.removeprefix("module."): parameter.grad.clone()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }


def first_step(file, changes=(), prepare=None):
    """The trainer after one step, the gradient of that step and what was logged.

    `prepare` is called with the trainer before.
    """
    fixed = ("train.max_steps=1", "train.save_strategy=no", "train.max_grad_norm=0")
    trainer = build_trainer(file, (*fixed, *changes))
    if prepare is not None:
        prepare(trainer)
    callback = Gradients()
    trainer.add_callback(callback)
    trainer.train()
    return trainer, callback.found, trainer.state.log_history[0]


if __name__ == "__main__":
    trainer, found, logged = first_step(Path(sys.argv[1]), sys.argv[3:])
    if trainer.is_world_process_zero():
        torch.save({"gradients": found, "loss": logged["loss"]}, sys.argv[2])
    torch.distributed.barrier()  # gloo may abort a process whose peer has left
    torch.distributed.destroy_process_group()
