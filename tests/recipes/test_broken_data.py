"""An image that breaks while a run trains: what was done is saved, and the run goes on from it."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from safetensors.torch import load_file

from medft.errors import DataError
from medft.training.trainer import RowTrackingTrainer

ROOT = Path(__file__).parents[2]
SCRIPTS = {"decoder": "decoder_qlora.py", "siglip": "siglip_lora.py"}


@pytest.fixture
def recipe(sections, data, tmp_path):
    """A recipe over a copy of the data, whose images a test may break; gives its file."""

    def write(kind, name, **train):
        chat = tmp_path / "chat"
        if not chat.exists():
            shutil.copytree(data / "chat", chat)
        content = sections(kind)
        content["data"] |= {
            split: str(chat / f"{split}.jsonl") for split in ("train", "validation")
        }
        content["train"] |= {"output_dir": str(tmp_path / name), "save_steps": 100, **train}
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(content))
        return file

    return write


def images_of(tmp_path, split):
    rows = map(json.loads, (tmp_path / "chat" / f"{split}.jsonl").read_text().splitlines())
    return {row["id"]: tmp_path / "chat" / row["images"][0] for row in rows}


class Broken:
    """A block in which half of an image file is missing; its header is there."""

    def __init__(self, path):
        self.path, self.content = path, path.read_bytes()

    def __enter__(self):
        self.path.write_bytes(self.content[: len(self.content) // 2])

    def __exit__(self, *_):
        self.path.write_bytes(self.content)


@pytest.fixture
def ids_of_steps(run_script):
    """Train undisturbed; gives the row ids of each step."""

    def train(kind, file):
        seen = []
        real = RowTrackingTrainer.get_batch_samples

        def noting(self, *args):
            found = real(self, *args)
            seen.append(list(self.row_ids))
            return found

        with mock.patch.object(RowTrackingTrainer, "get_batch_samples", noting):
            run_script(kind, file)
        return seen

    return train


def adapter(run):
    notes = json.loads((run / "adapter" / "medft.json").read_text())
    scale = {name: notes.get(name) for name in ("logit_scale", "logit_bias")}
    return load_file(run / "adapter" / "adapter_model.safetensors"), scale


def same(left, right):
    (first, own), (second, other) = adapter(left), adapter(right)
    assert first.keys() == second.keys()
    return own == other and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "train", "where"),
    [
        ("decoder", {"gradient_accumulation_steps": 2}, "in the middle"),
        ("decoder", {"dataloader_num_workers": 2}, "in the middle"),
        ("siglip", {"gradient_accumulation_steps": 2}, "in the middle"),
        pytest.param(
            "siglip", {"dataloader_num_workers": 2}, "in the middle", marks=pytest.mark.proof
        ),
        ("decoder", {"eval_strategy": "epoch", "eval_steps": None}, "in the second epoch"),
        ("siglip", {"eval_strategy": "epoch", "eval_steps": None}, "in the second epoch"),
    ],
)
def test_a_run_goes_on_bit_for_bit_once_the_image_is_restored(
    recipe, ids_of_steps, run_script, tmp_path, kind, train, where
):
    whole = recipe(kind, "whole", num_train_epochs=2, **train)
    steps = ids_of_steps(kind, whole)
    file = recipe(kind, "run", num_train_epochs=2, **train)
    middle, run = len(steps) // 2, tmp_path / "run"
    if where == "in the middle":
        broken = steps[middle - 3][-1]
        done = range(1, middle - 2)
    else:  # first read in step 1; broken as soon as the first epoch has ended
        broken, done = steps[middle][0], [middle]
    path = images_of(tmp_path, "train")[broken]
    if where == "in the middle":
        with Broken(path), pytest.raises(DataError) as caught:
            run_script(kind, file)
    else:
        real = RowTrackingTrainer.get_batch_samples

        def breaking(self, *args):
            if self.state.global_step == middle:
                with Broken(path):
                    return real(self, *args)
            return real(self, *args)

        with (
            mock.patch.object(RowTrackingTrainer, "get_batch_samples", breaking),
            pytest.raises(DataError) as caught,
        ):
            run_script(kind, file)
    [sentence] = caught.value.problems
    assert sentence.startswith(f"row {broken}: expected a complete image")
    assert str(path) in sentence
    [checkpoint] = run.glob("checkpoint-*")
    step = int(checkpoint.name[11:])
    assert step in done
    assert f"checkpoint-{step} is saved and the run goes on from it with" in sentence
    assert (checkpoint / "manifest.json").exists()
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "failed"
    assert broken in record["error"]
    run_script(kind, file, "train.resume_from_checkpoint=true")
    assert same(run, tmp_path / "whole")
    assert not same(run, checkpoint_as_run(checkpoint, tmp_path))


def checkpoint_as_run(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "other" / "adapter")
    return tmp_path / "other"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decoder", "siglip"])
def test_an_evaluation_that_breaks_saves_first(recipe, run_script, tmp_path, kind):
    train = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 3}
    run_script(kind, recipe(kind, "whole", **train))
    file = recipe(kind, "run", **train)
    broken, path = list(images_of(tmp_path, "validation").items())[-1]
    with Broken(path), pytest.raises(DataError) as caught:
        run_script(kind, file)
    [sentence] = caught.value.problems
    assert sentence.startswith(f"row {broken}: expected a complete image")
    assert "checkpoint-3 is saved without its evaluation, which a resumed run begins" in sentence
    run_script(kind, file, "train.resume_from_checkpoint=true")
    assert same(tmp_path / "run", tmp_path / "whole")
    history = json.loads((tmp_path / "run" / "log_history.json").read_text())
    assert [e["step"] for e in history if "eval_loss" in e] == [3, 6]


def test_a_row_that_is_broken_from_the_first_step_on_saves_nothing(
    recipe, run_script, tmp_path, ids_of_steps
):
    first, *_ = ids_of_steps("siglip", recipe("siglip", "whole", max_steps=3))
    file = recipe("siglip", "run", max_steps=3)
    with Broken(images_of(tmp_path, "train")[first[0]]), pytest.raises(DataError) as caught:
        run_script("siglip", file)
    assert "no step was done yet, start again with train.resume_from_checkpoint=auto" in str(
        caught.value
    )
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_is_killed_ends_the_run_after_it_has_saved(
    recipe, ids_of_steps, run_script, tmp_path, by
):
    train = {"num_train_epochs": 2, "dataloader_num_workers": 2, "dataloader_prefetch_factor": 1}
    ids_of_steps("siglip", recipe("siglip", "whole", **train))
    file = recipe("siglip", "run", **train)
    real = RowTrackingTrainer.get_batch_samples

    def killing(self, *args):
        if self.state.global_step == 3:
            os.kill(multiprocessing.active_children()[0].pid, by)
        return real(self, *args)

    with (
        mock.patch.object(RowTrackingTrainer, "get_batch_samples", killing),
        pytest.raises(DataError) as caught,
    ):
        run_script("siglip", file)
    [sentence] = caught.value.problems
    assert "expected the 2 worker processes that prepare batches to go on" in sentence
    assert "write train.dataloader_num_workers=1; " in sentence
    [checkpoint] = (tmp_path / "run").glob("checkpoint-*")  # what was prepared ahead was trained
    assert f"{checkpoint.name} is saved and the run goes on from it with" in sentence
    run_script("siglip", file, "train.resume_from_checkpoint=true")
    assert same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "split", "place"),
    [
        ("decoder", "train", 20),
        pytest.param("siglip", "train", 25, marks=pytest.mark.proof),
        ("decoder", "validation", -1),
    ],
)
def test_two_processes_stop_together_and_say_once_why(recipe, tmp_path, kind, split, place):
    train = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 3}
    file = recipe(kind, "run", per_device_train_batch_size=2, **train)
    content = yaml.safe_load(file.read_text())
    content["lora"]["dropout"] = 0.0
    content["train"]["gradient_checkpointing"] = False
    file.write_text(yaml.safe_dump(content))
    words = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command = [sys.executable, *words, ROOT / "recipes" / SCRIPTS[kind], file]

    def finished(*more):
        return subprocess.run(
            [*map(str, command), *more],
            capture_output=True, text=True, check=False, cwd=ROOT, timeout=240,
        )  # fmt: skip

    names = images_of(tmp_path, split)
    broken = list(names)[place]  # no process reads it in its first step
    with Broken(names[broken]):
        done = finished("train.num_train_epochs=3", "train.max_steps=-1")
    assert done.returncode not in (0, -9)
    sentences = [x for x in done.stderr.splitlines() if x.startswith("medft: error: ")]
    assert len(sentences) == 1, done.stderr
    assert f"row {broken}: expected a complete image" in sentences[0]
    assert "is saved" in sentences[0]
    [checkpoint] = (tmp_path / "run").glob("checkpoint-*")
    assert f"{checkpoint.name} is saved" in sentences[0]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {p.name for p in checkpoint.iterdir()}
    resumed = finished(
        "train.num_train_epochs=3", "train.max_steps=-1", "train.resume_from_checkpoint=true"
    )
    assert resumed.returncode == 0, resumed.stderr
