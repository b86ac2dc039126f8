"""The scripts users run: exact repetition, exact resumption, signals."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from medft.errors import RunError

ROOT = Path(__file__).parent.parent.parent
NF4 = "quantization={bits: 4}"
SIGNALLED = Path(__file__).parent / "signalled.py"


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
def repeated(sections, tmp_path_factory, run_script):
    """Short runs, by name; some differ in nothing, some in the seed."""
    folder = tmp_path_factory.mktemp("repeated")
    plans = {
        "decoder": ("decoder", []),
        "decoder again": ("decoder", []),
        "decoder other seed": ("decoder", ["train.seed=18"]),
        "nf4": ("decoder", [NF4]),
        "nf4 again": ("decoder", [NF4]),
        "siglip": ("siglip", []),
        "siglip again": ("siglip", []),
        "siglip other seed": ("siglip", ["train.seed=18"]),
    }
    for name, (kind, words) in plans.items():
        recipe = sections(kind)
        recipe["train"] |= {"output_dir": str(folder / name), "max_steps": 6}
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(recipe))
        run_script(kind, file, *words)
    return folder


@pytest.mark.parametrize("name", ["decoder", "nf4", "siglip"])
def test_the_same_recipe_and_seed_give_the_same_adapter_bit_for_bit(repeated, name):
    assert equal(repeated / name, repeated / f"{name} again")


@pytest.mark.parametrize("name", ["decoder", "siglip"])
def test_another_seed_gives_another_adapter(repeated, name):
    assert not equal(repeated / name, repeated / f"{name} other seed")


@pytest.fixture(scope="module")
def undisturbed(recipe_of, run_script):
    """Finished runs, by name."""
    plans = {"nf4": ("decoder", [NF4]), "siglip": ("siglip", [])}
    files = {name: recipe_of(kind, "run") for name, (kind, _) in plans.items()}
    for name, (kind, words) in plans.items():
        run_script(kind, files[name], *words)
    return {name: run_of(file) for name, file in files.items()}


@pytest.mark.slow
def test_losses_fall(undisturbed):
    for name in ("nf4", "siglip"):
        history = json.loads((undisturbed[name] / "log_history.json").read_text())
        losses = [entry["loss"] for entry in history if "loss" in entry]
        assert sum(losses[-5:]) < sum(losses[:5])


def finished(command: list[object]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip


def losses_of(run: Path) -> list[tuple[str, float]]:
    history = json.loads((run / "log_history.json").read_text())
    return [(name, e[name]) for e in history for name in ("loss", "eval_loss") if name in e]


def same_best(left: Path, right: Path) -> bool:
    first, second = (r / "best_model" / "adapter_model.safetensors" for r in (left, right))
    return first.read_bytes() == second.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "words"),
    [("decoder", [NF4]), pytest.param("siglip", [], marks=pytest.mark.proof)],
)
def test_a_killed_run_goes_on_bit_for_bit_past_checkpoints_that_are_not_complete(
    undisturbed, recipe_of, run_script, caplog, kind, words
):
    file = recipe_of(kind, "run")
    run = run_of(file)
    killed = finished([SIGNALLED, "SIGKILL", 26, kind, file, *words])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert json.loads((run / "run.json").read_text())["status"] == "running"
    assert not (run / "adapter").exists()
    steps = sorted(int(path.parent.name[11:]) for path in run.glob("checkpoint-*/manifest.json"))
    assert steps == [4, 8, 12, 16, 20, 24]
    (run / "checkpoint-24" / "optimizer.pt").unlink()
    truncated = run / "checkpoint-20" / "rng_state.pth"
    truncated.write_bytes(truncated.read_bytes()[:-20])
    per_epoch = json.loads((run / "run.json").read_text())["batch"]["steps_per_epoch"]
    assert per_epoch < 16 < 2 * per_epoch
    assert 16 % per_epoch != 0

    run_script(kind, file, *words, "train.resume_from_checkpoint=true")
    assert "skipped checkpoint-24: optimizer.pt is missing" in caplog.text
    assert "skipped checkpoint-20: rng_state.pth is not what was saved" in caplog.text
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "completed"
    assert record["resumed_from"] == "checkpoint-16"
    assert [part["from_step"] for part in record["parts"]] == [0, 16]
    reference = undisturbed["nf4" if kind == "decoder" else "siglip"]
    assert equal(run, reference)
    assert losses_of(run) == losses_of(reference)
    assert same_best(run, reference)


def test_a_changed_recipe_does_not_continue_a_run(repeated, tmp_path, run_script):
    run = tmp_path / "run"
    shutil.copytree(repeated / "decoder", run)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["train"] |= {"output_dir": str(run), "resume_from_checkpoint": True}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    differ = r"these keys differ: lora\.r \(4 -> 8\), train\.learning_rate \(0\.01 -> 0\.5\)"
    with pytest.raises(RunError, match=differ):
        run_script("decoder", file, "train.learning_rate=0.5", "lora.r=8")


def test_a_gradient_that_is_not_finite_stops_the_run_before_anything_is_kept(recipe_of, run_script):
    file = recipe_of("siglip", "run")
    words = ["train.learning_rate=1e30", "train.max_grad_norm=0", "train.warmup_steps=0"]
    with pytest.raises(RunError, match=r"^expected every ") as stopped:
        run_script("siglip", file, *words)
    [problem] = stopped.value.problems
    trained = re.search(r"after the rows ([0-9a-f, ]+): look at them", problem)[1].split(", ")
    assert len(trained) == 3
    run = run_of(file)
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    assert not list(run.glob("checkpoint-*/manifest.json"))
    assert not (run / "adapter").exists()


@pytest.mark.slow
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
    done = finished(["-c", code])
    assert done.returncode == 143, done.stderr
    assert not (run_of(file) / "adapter").exists()


@pytest.mark.slow
def test_the_launcher_shows_the_sentence_once_and_fails(sections, write_recipe):
    file = write_recipe(sections("decoder"))
    command = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"]
    done = finished([*command, "recipes/decoder_qlora.py", file, "train.learning_rate=fast"])
    assert done.returncode != 0
    assert done.stderr.count("medft: error: ") == 1
    assert not (file.parent / "run").exists()
