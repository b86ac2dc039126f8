"""A trainer from a recipe, made as the recipe's script makes it."""

import pytest
import torch
from fresh import reset_accelerator
from transformers import set_seed

from medft.config.recipe import DecoderRecipe
from medft.decoder.model import load_model
from medft.decoder.prepared import prepare_decoder_data
from medft.decoder.trainer import DecoderTrainer, decoder_arguments
from medft.models.lora import attach_adapter


@pytest.fixture
def build_trainer():
    """The trainer of a recipe file with overrides; its adapter fresh, or away from zero."""

    def build(file, changes=(), *, is_fresh=True):
        reset_accelerator()
        recipe = DecoderRecipe.load(file, changes)
        set_seed(3)
        arguments = decoder_arguments(recipe.train, dtype=recipe.model.dtype)
        inputs = prepare_decoder_data(recipe.model, recipe.data, recipe.lora, arguments)
        model = load_model(
            recipe.model,
            inputs.family,
            recipe.quantization,
            dtype=recipe.model.dtype,
            cross_attention_fix=recipe.model.cross_attention_fix,
        )
        model = attach_adapter(model, recipe.lora, inputs.family.presets, task_type="CAUSAL_LM")
        for name, parameter in model.named_parameters():
            if "lora_B" in name and not is_fresh:
                torch.nn.init.normal_(parameter, std=0.05)
        return DecoderTrainer(model, arguments, inputs, {"family": inputs.family.model_type})

    return build
