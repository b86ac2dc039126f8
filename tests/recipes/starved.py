"""A recipe script that may take no more memory from some moment on.

python starved.py loading|step|evaluation MEGABYTES decoder|siglip RECIPE.yaml [key=value ...]
"""

import resource
import runpy
import sys
from pathlib import Path

import psutil
from transformers import TrainerCallback, trainer

from medft.decoder import model as decoder_model
from medft.siglip import model as siglip_model
from medft.training.trainer import RowTrackingTrainer

SCRIPTS = {"decoder": "decoder_qlora.py", "siglip": "siglip_lora.py"}
MOMENT, MEGABYTES, KIND = sys.argv[1:4]


HOARD = []


def starve():
    """Leave some megabytes to this process, beyond what it holds: what it had freed is taken."""
    limit = psutil.Process().memory_info().vms + int(MEGABYTES) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        while True:
            HOARD.append(bytearray(2**19))
    except MemoryError:
        del HOARD[-2 * int(MEGABYTES) :]


class Starve(TrainerCallback):
    """Starves the third step of the last process, when its batch is there."""

    def on_step_begin(self, args, state, control, **kwargs):
        """Starve it."""
        if state.global_step == 2 and args.process_index == args.world_size - 1:
            starve()


def starving(function):
    """The function, with little memory."""

    def starved(*args, **options):
        starve()
        return function(*args, **options)

    return starved


if __name__ == "__main__":
    if MOMENT == "step":
        trainer.DEFAULT_CALLBACKS.append(Starve)
    if MOMENT == "evaluation":
        RowTrackingTrainer.evaluation_loop = starving(RowTrackingTrainer.evaluation_loop)
    if MOMENT == "loading":
        for module in (decoder_model, siglip_model):
            module.load_weights = starving(module.load_weights)
    script = Path(__file__).parents[2] / "recipes" / SCRIPTS[KIND]
    names = runpy.run_path(str(script))
    sys.exit(names["run_command"](names["main"], sys.argv[4:]))
