"""Fine-tune a SigLIP encoder with LoRA.

    accelerate launch recipes/siglip_lora.py RECIPE.yaml [section.key=value ...]

Without RECIPE.yaml: recipes/siglip/siglip_base_448.yaml.
"""

import sys
from dataclasses import asdict
from pathlib import Path

from medft.config.command_line import read_recipe
from medft.config.recipe import SiglipRecipe
from medft.errors import run_command
from medft.models.base import identify_base
from medft.models.lora import attach_adapter, initial_adapter
from medft.models.saved import find_adapter
from medft.siglip.model import (
    PRESETS,
    load_model,
    restore_scale_and_bias,
    splits_head,
    train_scale_and_bias,
)
from medft.siglip.prepared import prepare_siglip_data
from medft.siglip.trainer import SiglipTrainer, siglip_arguments
from medft.training.arguments import batch_arithmetic
from medft.training.process import process_setup
from medft.training.resume import check_output_dir, check_same_run
from medft.training.run import open_run


def main(argv: list[str]) -> None:
    recipe = read_recipe(SiglipRecipe, argv)
    with process_setup(seed=recipe.train.seed):
        arguments = siglip_arguments(recipe.train, dtype=recipe.model.dtype)
        checkpoint = check_output_dir(recipe.train)
        lora = recipe.lora.resumed() if checkpoint and recipe.lora else recipe.lora
        prepared = prepare_siglip_data(
            recipe.model, recipe.data, lora, recipe.contrastive, arguments
        )
        base = identify_base(recipe.model, prepared.config)
        if checkpoint:
            check_same_run(recipe, base, prepared.record, checkpoint, arguments.world_size)

        with open_run(
            recipe,
            argv,
            resuming=checkpoint is not None,
            base=base,
            data=prepared.record,
            batch=batch_arithmetic(prepared.rows_per_epoch, arguments) | asdict(prepared.batches),
            **initial_adapter(lora, base),
        ) as run:
            model = load_model(recipe.model, lora, image_size=recipe.data.image_size)
            if lora:
                model = attach_adapter(model, lora, PRESETS, task_type=None)
                train_scale_and_bias(model)
                if lora.init_from:
                    restore_scale_and_bias(model, find_adapter(Path(lora.init_from)))
            record = {
                "family": "siglip",
                **base,
                "image_size": recipe.data.image_size,
                "max_length": recipe.data.max_length,
                "dtype": recipe.model.dtype,
                "caption": recipe.data.caption,
                "splits_head": splits_head(lora),
            }
            trainer = SiglipTrainer(model, arguments, prepared, recipe.contrastive, record)
            run.train(trainer, checkpoint)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
