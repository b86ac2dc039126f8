"""The commands users type, in processes of their own: exact repetition, exact resumption."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent.parent
NF4 = "quantization={bits: 4}"


@pytest.fixture(scope="module")
def recipe_of(sections, tmp_path_factory):
    """A recipe file with many short steps and checkpoints: 12 to 13 steps an epoch, 3 epochs."""

    def write(kind: str, name: str) -> Path:
        folder = tmp_path_factory.mktemp("runs")
        recipe = sections(kind)
        recipe["train"] |= {
            "output_dir": str(folder / name),
            "num_train_epochs": 3,
            "save_steps": 4,
            "dataloader_num_workers": 1,
        }
        file = folder / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe))
        return file

    return write


def run_of(file: Path) -> Path:
    return Path(yaml.safe_load(file.read_text())["train"]["output_dir"])


def weights(run: Path) -> dict[str, torch.Tensor]:
    notes = json.loads((run / "adapter" / "medft.json").read_text())
    extra = {
        name: torch.tensor(notes[name], dtype=torch.float64)
        for name in ("logit_scale", "logit_bias")
        if name in notes
    }
    return {**load_file(run / "adapter" / "adapter_model.safetensors"), **extra}


def equal(left: Path, right: Path) -> bool:
    first, second = weights(left), weights(right)
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def undisturbed(recipe_of, start_script, output_of):
    """Finished runs, by name, all side by side."""
    plans = {
        "decoder": ("decoder", []),
        "decoder again": ("decoder", []),
        "decoder other seed": ("decoder", ["train.seed=18"]),
        "nf4": ("decoder", [NF4]),
        "nf4 again": ("decoder", [NF4]),
        "siglip": ("siglip", []),
        "siglip other seed": ("siglip", ["train.seed=18"]),
    }
    files = {name: recipe_of(kind, "run") for name, (kind, _) in plans.items()}
    waiting = list(plans.items())
    while waiting:
        pair, waiting = waiting[:2], waiting[2:]
        started = [start_script(kind, files[name], *words) for name, (kind, words) in pair]
        for process in started:
            output_of(process)
    return {name: run_of(file) for name, file in files.items()}


@pytest.mark.parametrize("name", ["decoder", "nf4"])
def test_the_same_recipe_and_seed_give_the_same_adapter_bit_for_bit(undisturbed, name):
    assert equal(undisturbed[name], undisturbed[f"{name} again"])


@pytest.mark.parametrize("name", ["decoder", "siglip"])
def test_another_seed_gives_another_adapter(undisturbed, name):
    assert not equal(undisturbed[name], undisturbed[f"{name} other seed"])


def test_losses_fall(undisturbed):
    for name in ("decoder", "nf4", "siglip"):
        history = json.loads((undisturbed[name] / "log_history.json").read_text())
        losses = [entry["loss"] for entry in history if "loss" in entry]
        assert sum(losses[-5:]) < sum(losses[:5])


def wait_for(run: Path, step: int, process: subprocess.Popen) -> None:
    """Return once a checkpoint at or after a step is whole, or the process has ended."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        done = [int(p.parent.name[11:]) for p in run.glob("checkpoint-*/manifest.json")]
        if max(done, default=0) >= step:
            break
        time.sleep(0.005)


def losses_of(run: Path) -> list[tuple[str, float]]:
    history = json.loads((run / "log_history.json").read_text())
    return [(name, e[name]) for e in history for name in ("loss", "eval_loss") if name in e]


def same_best(left: Path, right: Path) -> bool:
    first, second = (r / "best_model" / "adapter_model.safetensors" for r in (left, right))
    return first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(("kind", "words"), [("decoder", [NF4]), ("siglip", [])])
def test_a_killed_run_goes_on_bit_for_bit_past_checkpoints_that_are_not_whole(
    undisturbed, recipe_of, start_script, output_of, kind, words
):
    file = recipe_of(kind, "run")
    run = run_of(file)
    process = start_script(kind, file, *words)
    wait_for(run, 20, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert json.loads((run / "run.json").read_text())["status"] == "running"
    assert not (run / "adapter").exists()
    steps = sorted(int(path.parent.name[11:]) for path in run.glob("checkpoint-*/manifest.json"))
    per_epoch = json.loads((run / "run.json").read_text())["batch"]["steps_per_epoch"]
    (run / f"checkpoint-{steps[-1]}" / "optimizer.pt").unlink()
    for step in steps[:-1]:
        if step > 16:
            torn = run / f"checkpoint-{step}" / "rng_state.pth"
            torn.write_bytes(torn.read_bytes()[:-20])
    assert per_epoch < 16 < 2 * per_epoch
    assert 16 % per_epoch != 0

    output = output_of(start_script(kind, file, *words, "train.resume_from_checkpoint=true"))
    assert f"skipped checkpoint-{steps[-1]}: optimizer.pt is missing" in output
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "completed"
    assert record["resumed_from"] == "checkpoint-16"
    assert len(record["resumed"]) == 1
    reference = undisturbed["nf4" if kind == "decoder" else "siglip"]
    assert equal(run, reference)
    assert losses_of(run) == losses_of(reference)
    assert same_best(run, reference)


def test_a_changed_recipe_does_not_continue_a_run(undisturbed, tmp_path, start_script, output_of):
    run = tmp_path / "run"
    shutil.copytree(undisturbed["decoder"], run)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["train"] |= {"output_dir": str(run), "resume_from_checkpoint": True}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    words = ["train.learning_rate=0.5", "lora.r=8"]
    output = output_of(start_script("decoder", file, *words), code=2)
    assert "these keys differ: lora.r (4 -> 8), train.learning_rate (0.01 -> 0.5)" in output


def test_a_gradient_that_is_no_number_stops_the_run_before_anything_is_kept(
    recipe_of, start_script, output_of
):
    file = recipe_of("siglip", "run")
    words = ["train.learning_rate=1e30", "train.max_grad_norm=0", "train.warmup_steps=0"]
    output = output_of(start_script("siglip", file, *words), code=2)
    assert output.count("medft: error: expected every ") == 1
    trained = re.search(r"after the rows ([0-9a-f, ]+): look at them", output)[1].split(", ")
    assert len(trained) == 3
    assert "Traceback" not in output
    run = run_of(file)
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    assert not list(run.glob("checkpoint-*/manifest.json"))
    assert not (run / "adapter").exists()


def test_sigterm_saves_a_whole_checkpoint_and_exits_143(
    undisturbed, recipe_of, start_script, output_of
):
    file = recipe_of("siglip", "run")
    run = run_of(file)
    process = start_script("siglip", file)
    wait_for(run, 8, process)
    process.terminate()
    output_of(process, code=143)
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "interrupted"
    assert not (run / "adapter").exists()
    assert (run / f"checkpoint-{record['steps_done']}" / "manifest.json").exists()
    output_of(start_script("siglip", file, "train.resume_from_checkpoint=true"))
    assert equal(run, undisturbed["siglip"])
    assert losses_of(run) == losses_of(undisturbed["siglip"])
    assert same_best(run, undisturbed["siglip"])


def test_medft_train_launches_the_script_and_passes_sigterm_on(recipe_of):
    file = recipe_of("siglip", "run")
    run = run_of(file)
    command = [sys.executable, "-m", "medft.cli", "train", str(file), "train.num_train_epochs=200"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    wait_for(run, 4, process)
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "interrupted"
    assert (run / f"checkpoint-{record['steps_done']}" / "manifest.json").exists()


def test_sigterm_before_training_begins_is_not_lost(recipe_of):
    file = recipe_of("siglip", "run")
    code = f"""
import os, signal, sys, threading, time
from pathlib import Path
import psutil
from medft.training.launch import train

def stop_as_soon_as_the_launcher_runs():
    while not psutil.Process().children():
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=stop_as_soon_as_the_launcher_runs).start()
sys.exit(train(Path({str(file)!r}), ["train.num_train_epochs=500"], None))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 143, done.stderr
    assert not (run_of(file) / "adapter").exists()


def test_the_launcher_shows_the_sentence_once_and_fails(sections, write_recipe):
    file = write_recipe(sections("decoder"))
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file",
        str(ROOT / "accelerate_configs" / "cpu.yaml"), str(ROOT / "recipes" / "decoder_qlora.py"),
        str(file), "train.learning_rate=fast",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode != 0
    assert done.stderr.count("medft: error: ") == 1
    assert not (file.parent / "run").exists()
