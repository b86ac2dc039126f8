"""A trainer from a recipe, made as the recipe's script makes it."""

import pytest
import torch
from transformers import set_seed

from medft.compat import reset_accelerator
from medft.config.recipe import DecoderRecipe
from medft.decoder.build import build_trainer as build
from medft.decoder.prepared import prepare_decoder_data
from medft.decoder.trainer import decoder_arguments
from medft.models.base import identify_base


@pytest.fixture
def build_trainer():
    """The trainer of a recipe file with overrides; its adapter fresh, or away from zero."""

    def make(file, changes=(), *, is_fresh=True, **options):
        reset_accelerator()
        recipe = DecoderRecipe.load(file, changes)
        set_seed(3)
        arguments = decoder_arguments(recipe.train, dtype=recipe.model.dtype)
        prepared = prepare_decoder_data(recipe.model, recipe.data, recipe.lora, arguments)
        trainer = build(
            recipe.model,
            recipe.data,
            recipe.quantization,
            recipe.lora,
            arguments=arguments,
            prepared=prepared,
            base=identify_base(recipe.model),
            **options,
        )
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name and not is_fresh:
                torch.nn.init.normal_(parameter, std=0.05)
        return trainer

    return make
