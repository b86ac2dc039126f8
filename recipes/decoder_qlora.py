"""Fine-tune an image-text decoder with QLoRA.

    accelerate launch recipes/decoder_qlora.py RECIPE.yaml [section.key=value ...]

Without RECIPE.yaml: recipes/decoder/llama32_11b_24gb.yaml.
"""

import sys

from medft.config.command_line import read_recipe
from medft.config.recipe import DecoderRecipe
from medft.decoder.model import load_model
from medft.decoder.prepared import inference_record, prepare_decoder_data
from medft.decoder.trainer import DecoderTrainer, decoder_arguments
from medft.errors import run_command
from medft.models.base import identify_base
from medft.models.lora import attach_adapter, initial_adapter
from medft.training.arguments import batch_arithmetic
from medft.training.process import process_setup
from medft.training.resume import check_output_dir, check_same_run
from medft.training.run import open_run


def main(argv: list[str]) -> None:
    recipe = read_recipe(DecoderRecipe, argv)
    with process_setup(seed=recipe.train.seed):
        arguments = decoder_arguments(recipe.train, dtype=recipe.model.dtype)
        checkpoint = check_output_dir(recipe.train)
        lora = recipe.lora.resumed() if checkpoint and recipe.lora else recipe.lora
        prepared = prepare_decoder_data(recipe.model, recipe.data, lora, arguments)
        base = identify_base(recipe.model, prepared.config)
        if checkpoint:
            check_same_run(recipe, base, prepared.record, checkpoint, arguments.world_size)

        with open_run(
            recipe,
            argv,
            resuming=checkpoint is not None,
            base=base,
            data=prepared.record,
            batch=batch_arithmetic(prepared.rows_per_epoch, arguments),
            **initial_adapter(lora, base),
        ) as run:
            model = load_model(
                recipe.model,
                prepared.family,
                recipe.quantization,
                dtype=recipe.model.dtype if lora else "float32",
                cross_attention_fix=recipe.model.cross_attention_fix,
            )
            if lora:
                model = attach_adapter(model, lora, prepared.family.presets, task_type="CAUSAL_LM")
            record = {
                "family": prepared.family.model_type,
                **base,
                **inference_record(recipe.model, recipe.data, recipe.quantization),
            }
            run.train(DecoderTrainer(model, arguments, prepared, record), checkpoint)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
