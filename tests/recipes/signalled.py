"""A recipe script that gets a signal at the end of one of its steps.

python signalled.py SIGNAL STEP decoder|siglip RECIPE.yaml [section.key=value ...]
"""

import os
import runpy
import signal
import sys
from pathlib import Path

from transformers import TrainerCallback, trainer

SCRIPTS = {"decoder": "decoder_qlora.py", "siglip": "siglip_lora.py"}


class SignalAt(TrainerCallback):
    """Sends this process a signal when a step has ended; it comes before medft's own callbacks."""

    def on_step_end(self, args, state, control, **kwargs):
        """Send it."""
        if state.global_step == int(sys.argv[2]):
            os.kill(os.getpid(), getattr(signal, sys.argv[1]))


if __name__ == "__main__":
    trainer.DEFAULT_CALLBACKS.append(SignalAt)
    script = Path(__file__).parents[2] / "recipes" / SCRIPTS[sys.argv[3]]
    names = runpy.run_path(str(script))
    sys.exit(names["run_command"](names["main"], sys.argv[4:]))
