"""Fine-tune an image-text decoder with QLoRA.

    accelerate launch recipes/decoder_qlora.py RECIPE.yaml [section.key=value ...]

Without RECIPE.yaml: recipes/decoder/llama32_11b_24gb.yaml.
"""

import sys

from medft.errors import run_command


def main(argv: list[str]) -> None:
    # the libraries are imported here, so that Ctrl-C meanwhile ends without a traceback
    from medft.config.command_line import read_recipe
    from medft.config.recipe import DecoderRecipe
    from medft.decoder.build import build_trainer
    from medft.decoder.prepared import prepare_decoder_data
    from medft.decoder.trainer import decoder_arguments
    from medft.models.resolved import take_recorded
    from medft.training.process import training_setup
    from medft.training.resume import open_output_dir
    from medft.training.run import open_run

    words, recorded = take_recorded(argv)
    recipe = read_recipe(DecoderRecipe, words)
    with training_setup(recipe.train.seed) as signals:
        dtype = recipe.model.dtype
        arguments = decoder_arguments(recipe.train, dtype=dtype, recorded=recorded)
        with open_output_dir(recipe, arguments) as folder:
            lora = recipe.initial_lora(resumes=folder.checkpoint is not None)
            prepared = prepare_decoder_data(recipe.model, recipe.data, lora, arguments)
            common = {"arguments": arguments, "prepared": prepared, "recorded": recorded}
            with open_run(recipe, argv, folder=folder, signals=signals, **common) as run:
                sections = recipe.model, recipe.data, recipe.quantization, lora
                run.train(build_trainer(*sections, base=run.base, **common), folder.checkpoint)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
