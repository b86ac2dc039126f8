"""Runs that are stopped: their recipe's steps, their process's signals, and what they come to."""

import json
import signal
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
SIGNALLED = ROOT / "tests" / "recipes" / "signalled.py"
STEPS = {"max_steps": 12, "save_steps": 4, "eval_strategy": "steps", "eval_steps": 5}


def listen():
    """Undo what a shell does to its background jobs, which a user's terminal does not."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def record_of(run):
    """The content of run.json."""
    return json.loads((run / "run.json").read_text())


def results(run):
    """What a run comes to: weights of adapter/ and best_model/, and each loss with its step."""
    history = json.loads((run / "log_history.json").read_text())
    names = ("loss", "eval_loss", "grad_norm", "learning_rate")
    losses = [(e["step"], name, e[name]) for e in history for name in names if name in e]
    weights = [
        {name: weight.tolist() for name, weight in load_file(file).items()}
        for file in (run / part / "adapter_model.safetensors" for part in ("adapter", "best_model"))
    ]
    return losses, weights, record_of(run)["best_metric"]


def complete(run):
    """The steps of complete checkpoints."""
    return sorted(int(p.parent.name[11:]) for p in run.glob("checkpoint-*/manifest.json"))
