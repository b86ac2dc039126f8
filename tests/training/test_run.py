"""What a finished run says of itself."""

import json
import shutil

import pytest
import torch

from medft.training.checkpoints import write_manifest
from medft.training.results import final_metrics


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


def test_a_resumed_run_says_that_it_has_another_number_of_threads(
    sections, write_recipe, run_script, monkeypatch, caplog
):
    recipe = sections("siglip")
    recipe["data"]["validation"] = None
    recipe["train"] |= {"max_steps": 2, "save_steps": 1}
    file = write_recipe(recipe)
    run_script("siglip", file)
    run = file.parent / "run"
    (run / "checkpoint-2" / "manifest.json").unlink()
    assert json.loads((run / "run.json").read_text())["launch"]["threads"] == 1
    monkeypatch.setenv("MEDFT_THREADS", "2")
    try:
        run_script("siglip", file, "train.resume_from_checkpoint=true")
    finally:
        torch.set_num_threads(1)
    assert "undisturbed run: threads was 1 and is 2" in caplog.text
    assert "MEDFT_THREADS=1 restores the threads" in caplog.text
    assert json.loads((run / "run.json").read_text())["launch"]["threads"] == 2


@pytest.mark.slow
def test_the_evaluation_before_the_first_step_counts(
    sections, write_recipe, run_script, tmp_path, caplog
):
    recipe = sections("decoder")
    recipe["train"] |= {"max_steps": 9, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    recipe["train"] |= {"early_stopping_patience": 2, "eval_on_start": True, "warmup_steps": 0}
    found = {}
    for name, learning_rate in (("worse", 2.0), ("better", 1e-2)):
        recipe["train"]["learning_rate"] = learning_rate
        file = write_recipe(recipe, name)
        run_script("decoder", file)
        found[name] = tmp_path / name
    for name, run in found.items():
        record = json.loads((run / "run.json").read_text())
        values = {step: value for step, value in evaluations(run)}
        best = min(values, key=values.__getitem__)
        assert list(values) == list(range(record["steps_done"] + 1))
        assert (best == 0) == (name == "worse")
        assert (run / "best_model").exists() == (best != 0)
        assert record["best_metric"] == (values[best] if best else None)
        if best:
            kept = (run / f"checkpoint-{best}" / "adapter_model.safetensors").read_bytes()
            assert (run / "best_model" / "adapter_model.safetensors").read_bytes() == kept
    assert json.loads((found["worse"] / "run.json").read_text())["steps_done"] == 2
    assert "no best_model/: the best evaluation, " in caplog.text

    whole = evaluations(found["worse"])
    (found["worse"] / "checkpoint-2" / "manifest.json").unlink()
    file = tmp_path / "worse.yaml"
    run_script("decoder", file, "train.resume_from_checkpoint=true")
    record = json.loads((found["worse"] / "run.json").read_text())
    assert (record["resumed_from"], record["steps_done"]) == ("checkpoint-1", 2)
    assert evaluations(found["worse"]) == whole
    assert not (found["worse"] / "best_model").exists()


def evaluations(run):
    history = json.loads((run / "log_history.json").read_text())
    return [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
