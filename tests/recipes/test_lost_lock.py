"""A run whose folder another run has taken meanwhile writes nothing into it any more."""

import os
import signal
from pathlib import Path

import pytest
from transformers import TrainerCallback, trainer

from medft.errors import RunError
from medft.training.run_lock import LOCK_FILE

FILES = ("run.json", "log_history.json", "curves.png", "recipe.yaml", LOCK_FILE)


class TakeOver(TrainerCallback):
    """After step 2 the folder is another run's, and this one may get a signal."""

    def __init__(self, number):
        self._number = number

    def on_step_end(self, args, state, control, **kwargs):
        """Write what the other run has written."""
        if state.global_step == 2:
            for name in FILES:
                (Path(args.output_dir) / name).write_text("another's")
            if self._number:
                os.kill(os.getpid(), self._number)


@pytest.fixture
def taken(sections, write_recipe, run_script, tmp_path, monkeypatch):
    """Train while another run takes the folder; gives what is in it then."""

    def train(number=None, **keys):
        recipe = sections("siglip")
        recipe["train"] |= {"max_steps": 4, **keys}
        if "eval_strategy" not in keys:
            recipe["data"]["validation"] = None
        callbacks = [*trainer.DEFAULT_CALLBACKS, TakeOver(number)]
        monkeypatch.setattr(trainer, "DEFAULT_CALLBACKS", callbacks)
        with pytest.raises(RunError, match="another run has taken it"):
            run_script("siglip", write_recipe(recipe))
        files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
        return {path.relative_to(tmp_path / "run").as_posix(): path.read_bytes() for path in files}

    return train


@pytest.mark.parametrize(
    ("number", "keys"),
    [
        (None, {"save_strategy": "steps", "save_steps": 3}),
        (None, {"save_strategy": "no", "eval_strategy": "steps", "eval_steps": 3}),
        (None, {"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 1}),
        (None, {"save_strategy": "no"}),
        (signal.SIGTERM, {}),
    ],
    ids=["save", "evaluation", "epoch", "result", "signal"],
)
def test_a_run_that_lost_its_folder_ends_before_it_writes(taken, number, keys):
    left = taken(number, **keys)
    del left[".reserve.draft"]
    assert left == dict.fromkeys(FILES, b"another's")
