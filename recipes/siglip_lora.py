"""Fine-tune a SigLIP encoder with LoRA.

    accelerate launch recipes/siglip_lora.py RECIPE.yaml [section.key=value ...]

Without RECIPE.yaml: recipes/siglip/siglip_base_448.yaml.
"""

import sys

from medft.errors import run_command


def main(argv: list[str]) -> None:
    # the libraries are imported here, so that Ctrl-C meanwhile ends without a traceback
    from medft.config.command_line import read_recipe
    from medft.config.recipe import SiglipRecipe
    from medft.models.resolved import take_recorded
    from medft.siglip.build import build_trainer
    from medft.siglip.prepared import prepare_siglip_data
    from medft.siglip.trainer import siglip_arguments
    from medft.training.process import training_setup
    from medft.training.resume import open_output_dir
    from medft.training.run import open_run

    words, recorded = take_recorded(argv)
    recipe = read_recipe(SiglipRecipe, words)
    with training_setup(recipe.train.seed) as signals:
        dtype = recipe.model.dtype
        arguments = siglip_arguments(recipe.train, dtype=dtype, recorded=recorded)
        with open_output_dir(recipe, arguments) as folder:
            lora = recipe.initial_lora(resumes=folder.checkpoint is not None)
            sections = recipe.model, recipe.data, lora, recipe.contrastive
            prepared = prepare_siglip_data(*sections, arguments)
            common = {"arguments": arguments, "prepared": prepared, "recorded": recorded}
            with open_run(recipe, argv, folder=folder, signals=signals, **common) as run:
                run.train(build_trainer(*sections, base=run.base, **common), folder.checkpoint)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
