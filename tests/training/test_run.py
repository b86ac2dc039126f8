"""What a finished run says of itself."""

import json
import shutil

from medft.training.checkpoints import write_manifest
from medft.training.run import final_metrics


def test_final_metrics_are_the_last_ones():
    history = [
        {"loss": 3.0, "step": 1},
        {"eval_loss": 2.0, "step": 1},
        {"loss": 1.0, "step": 2},
        {"eval_loss": 1.5, "eval_pairs": 4, "step": 2},
        {"train_runtime": 9},
    ]
    assert final_metrics(history) == {"loss": 1.0, "eval_loss": 1.5, "eval_pairs": 4}


def test_a_resumed_run_saves_logs_and_evaluates_as_its_recipe_says_now(
    sections, write_recipe, run_script, tmp_path
):
    recipe = sections("siglip")
    run = tmp_path / "run"
    recipe["train"] |= {"output_dir": str(run), "max_steps": 4, "save_steps": 2}
    recipe["train"] |= {"logging_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    file = write_recipe(recipe)
    run_script("siglip", file)
    shutil.rmtree(run / "checkpoint-4")
    state = json.loads((run / "checkpoint-2" / "trainer_state.json").read_text())
    (run / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(state | {"eval_steps": 9}))
    write_manifest(run / "checkpoint-2", world_size=1)
    run_script("siglip", file, "train.resume_from_checkpoint=true", "train.save_steps=1",
               "train.logging_steps=1")  # fmt: skip
    assert {path.name for path in run.glob("checkpoint-*")} >= {"checkpoint-3", "checkpoint-4"}
    history = json.loads((run / "log_history.json").read_text())
    assert [entry["step"] for entry in history if "loss" in entry] == [3, 4]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [2, 4]
