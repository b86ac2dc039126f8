"""An evaluation that a stop left out comes first where a run goes on, and counts as ever."""

import json
import os
import signal

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback, trainer

from medft.errors import Stopped

RESUME = "train.resume_from_checkpoint=true"


class StopInEvaluation(TrainerCallback):
    """Sends SIGTERM in the evaluation after a step."""

    def __init__(self, step):
        self._step = step

    def on_prediction_step(self, args, state, control, **kwargs):
        """Send it."""
        if state.global_step == self._step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def train(sections, write_recipe, run_script, tmp_path, monkeypatch):
    """Train undisturbed, and stopped in the evaluation after a step; gives both runs."""

    def both(step, **keys):
        recipe = sections("siglip")
        recipe["lora"]["dropout"] = 0.1
        recipe["train"] |= {"eval_strategy": "steps", "eval_steps": 2, **keys}
        run_script("siglip", write_recipe(recipe, "whole"))
        file = write_recipe(recipe, "stopped")
        with monkeypatch.context() as patch:
            callbacks = [*trainer.DEFAULT_CALLBACKS, StopInEvaluation(step)]
            patch.setattr(trainer, "DEFAULT_CALLBACKS", callbacks)
            with pytest.raises(Stopped):
                run_script("siglip", file)
        run_script("siglip", file, RESUME)
        return tmp_path / "whole", tmp_path / "stopped"

    return both


def results(run):
    """What a run comes to."""
    history = json.loads((run / "log_history.json").read_text())
    names = ("loss", "eval_loss", "learning_rate")
    record = json.loads((run / "run.json").read_text())
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    best = load_file(run / "best_model" / "adapter_model.safetensors")
    return {
        "log": [(e["step"], name, e[name]) for e in history for name in names if name in e],
        "weights": {name: weight.tolist() for name, weight in weights.items()},
        "best": {name: weight.tolist() for name, weight in best.items()},
        "evaluation": json.loads((run / "best_model" / "evaluation.json").read_text()),
        "record": [record[key] for key in ("best_metric", "steps_done", "status")],
    }


PLATEAU = {"patience": 0, "factor": 0.5, "threshold": 100.0, "threshold_mode": "abs"}
EARLY = {"early_stopping_patience": 2, "early_stopping_threshold": 100.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {"lr_scheduler_type": "constant"},  # the evaluation of step 6 is the best
        EARLY,  # it ends the training
        {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": PLATEAU},
    ],
    ids=["best model", "early stopping", "schedule"],
)
def test_an_evaluation_that_was_left_out_counts_as_if_it_had_been_made(train, keys):
    whole, stopped = train(6, max_steps=10, **keys)
    assert json.loads((stopped / "run.json").read_text())["resumed_from"] == "checkpoint-6"
    assert results(stopped) == results(whole)
