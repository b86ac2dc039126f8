"""A recipe script that gets a signal at a given moment.

python signalled.py SIGNAL MOMENT decoder|siglip RECIPE.yaml [section.key=value ...]

MOMENT: N, at the end of step N; evaluation:N, in the evaluation after step N; loading, when the
model is loaded; checkpoint:N, while the files of checkpoint N are written; best_model, while
best_model/ is written for the first time. Under a launcher every process gets it,
or with SIGNAL@R the process of rank R alone.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

from transformers import TrainerCallback, trainer

SCRIPTS = {"decoder": "decoder_qlora.py", "siglip": "siglip_lora.py"}
NAME, _, RANK = sys.argv[1].partition("@")
MOMENT, _, STEP = sys.argv[2].partition(":")
if MOMENT.isdecimal():
    MOMENT, STEP = "step", MOMENT


def send():
    """Send it to this process."""
    if RANK in ("", os.environ.get("RANK", "0")):
        os.kill(os.getpid(), getattr(signal, NAME))


class SignalAt(TrainerCallback):
    """Sends the signal; it comes before medft's own callbacks."""

    def on_init_end(self, args, state, control, **kwargs):
        """When the trainer was made: nothing is trained."""
        if MOMENT == "loading":
            send()

    def on_step_end(self, args, state, control, **kwargs):
        """At the end of a step."""
        if MOMENT == "step" and str(state.global_step) == STEP:
            send()

    def on_prediction_step(self, args, state, control, **kwargs):
        """In an evaluation, after its first batch."""
        if MOMENT == "evaluation" and str(state.global_step) == STEP:
            send()


def send_when_written(name):
    """Send it as soon as a file of this name was opened below the moment's folder."""

    def watch(event, words):
        path = str(words[0]) if event == "open" else ""
        folder = f"checkpoint-{STEP}/" if MOMENT == "checkpoint" else f".{MOMENT}.draft/"
        if folder in path and path.endswith(name):
            send()

    sys.addaudithook(watch)


if __name__ == "__main__":
    trainer.DEFAULT_CALLBACKS.append(SignalAt)
    if MOMENT in ("checkpoint", "best_model", "adapter"):
        send_when_written("adapter_config.json")
    script = Path(__file__).parents[2] / "recipes" / SCRIPTS[sys.argv[3]]
    names = runpy.run_path(str(script))
    sys.exit(names["run_command"](names["main"], sys.argv[4:]))
