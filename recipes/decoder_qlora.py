"""Fine-tune an image-text decoder with QLoRA.

    accelerate launch recipes/decoder_qlora.py RECIPE.yaml [section.key=value ...]

Without RECIPE.yaml: recipes/decoder/llama32_11b_24gb.yaml.
"""

import sys

from medft.config.recipe import DecoderRecipe
from medft.decoder.model import load_model
from medft.decoder.prepared import inference_notes, prepare_inputs
from medft.decoder.trainer import DecoderTrainer, decoder_arguments
from medft.errors import run_command
from medft.models.base import identify_base
from medft.models.lora import attach_adapter, initial_adapter
from medft.training.launch import process_set_up, read_recipe
from medft.training.run import batch_arithmetic, check_output_dir, check_same_run, open_run


def main(argv: list[str]) -> None:
    recipe = read_recipe(DecoderRecipe, argv)
    with process_set_up(seed=recipe.train["seed"]):
        arguments = decoder_arguments(recipe.train, dtype=recipe.model.dtype)
        checkpoint = check_output_dir(recipe.train)
        lora = recipe.lora.resumed() if checkpoint and recipe.lora else recipe.lora
        inputs = prepare_inputs(recipe.model, recipe.data, lora, arguments)
        base = identify_base(recipe.model, inputs.config)
        if checkpoint:
            check_same_run(recipe, base, inputs.record, checkpoint, arguments.world_size)

        with open_run(
            recipe,
            argv,
            resuming=checkpoint is not None,
            base=base,
            data=inputs.record,
            batch=batch_arithmetic(inputs.rows_per_epoch, arguments),
            **initial_adapter(lora, base),
        ) as run:
            model = load_model(
                recipe.model,
                inputs.family,
                recipe.quantization,
                dtype=recipe.model.dtype if lora else "float32",
                cross_attention_fix=recipe.model.cross_attention_fix,
            )
            if lora:
                model = attach_adapter(model, lora, inputs.family.presets, task_type="CAUSAL_LM")
            notes = {
                "family": inputs.family.model_type,
                **base,
                **inference_notes(recipe.model, recipe.data, recipe.quantization),
            }
            run.train(DecoderTrainer(model, arguments, inputs, notes), checkpoint)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
