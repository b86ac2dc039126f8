"""What may change where a run goes on, and what a run that goes on is equal to."""

import json
import re
import shutil
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from medft.check import check
from medft.errors import NothingToDo, RunError, run_command
from medft.training.run_lock import RunLock

ROOT = Path(__file__).parent.parent.parent
SIGNALLED = Path(__file__).parent / "signalled.py"
RESUME = "train.resume_from_checkpoint=true"
AUTO = "train.resume_from_checkpoint=auto"


@pytest.fixture
def train(sections, data, tmp_path, run_script):
    """Train 5 steps an epoch, with dropout and augmentation, into a folder; gives the run."""
    rows = data / "chat" / "fifteen.jsonl"
    rows.write_text("".join((data / "chat" / "train.jsonl").open().readlines()[:15]))

    def run(name, kind="decoder", *changes, **train):
        recipe = sections(kind)
        recipe["data"]["train"] = str(rows)
        recipe["lora"]["dropout"] = 0.1
        recipe["train"] |= {"max_steps": 12, "output_dir": str(tmp_path / name), **train}
        if kind == "siglip":
            recipe["data"] |= {"random_rotation": 5, "random_crop": 0.9, "random_brightness": 0.1}
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(recipe))
        run_script(kind, file, *changes)
        return tmp_path / name

    return run


def weights(run):
    """Of the adapter, with SigLIP's scale and bias."""
    notes = json.loads((run / "adapter" / "medft.json").read_text())
    scalars = {k: torch.tensor(notes[k]) for k in ("logit_scale", "logit_bias") if k in notes}
    return load_file(run / "adapter" / "adapter_model.safetensors") | scalars


def are_equal(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def record(run):
    return json.loads((run / "run.json").read_text())


def history(run, name):
    entries = json.loads((run / "log_history.json").read_text())
    return {entry["step"]: entry[name] for entry in entries if name in entry}


def lose_checkpoints(run, after):
    """Leave a run as a kill would have after a step."""
    for path in run.glob("checkpoint-*"):
        if int(path.name.removeprefix("checkpoint-")) > after:
            shutil.rmtree(path)
    content = record(run)
    content |= {"status": "running"}
    content["parts"][-1]["status"] = "running"
    for entries in (content, content["parts"][-1]):
        del entries["ended"], entries["steps_done"]
    (run / "run.json").write_text(json.dumps(content))


FREE = ["train.dataloader_num_workers=2", "train.dataloader_prefetch_factor=3",
        "train.dataloader_pin_memory=true", "train.gradient_checkpointing=true",
        "train.gradient_checkpointing_kwargs={use_reentrant: false}",
        "train.torch_empty_cache_steps=2", "train.save_steps=2", "train.save_total_limit=2",
        "train.logging_steps=3"]  # fmt: skip
EVALUATED = ["train.eval_strategy=steps", "train.eval_steps=1", "train.eval_delay=9",
             "train.eval_on_start=true", "train.per_device_eval_batch_size=3",
             "train.eval_accumulation_steps=1"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decoder", "siglip"])
@pytest.mark.parametrize("changes", [FREE, EVALUATED], ids=["free", "evaluated"])
def test_what_does_not_change_the_training_may_change_where_a_run_goes_on(train, kind, changes):
    run = train("run", kind, save_steps=7)
    undisturbed, losses = weights(run), history(run, "loss")
    lose_checkpoints(run, after=7)
    begun = load_file(run / "checkpoint-7" / "adapter_model.safetensors")
    train("run", kind, RESUME, *changes, save_steps=7)
    assert are_equal(weights(run), undisturbed)
    assert not any(torch.equal(tensor, undisturbed[name]) for name, tensor in begun.items())
    found = record(run)
    assert found["parts"][1]["from_step"] == 7
    assert found["parts"][1]["changed"].keys() >= {word.partition("=")[0] for word in changes} - {
        "train.gradient_checkpointing_kwargs",
        "train.eval_strategy",
    }
    if changes == EVALUATED:
        assert history(run, "loss") == losses
        assert [step for step in history(run, "eval_loss") if step > 7] == [9, 10, 11, 12]
    else:
        assert sorted(path.name for path in run.glob("checkpoint-*")) == [
            "checkpoint-10",
            "checkpoint-12",
        ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "schedule", "short", "long"),
    [
        ("decoder", {"lr_scheduler_type": "constant"}, {"max_steps": 7}, {"max_steps": 12}),
        (
            "decoder",
            {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 3, "max_steps": -1},
            {"num_train_epochs": 1},  # its last step is an epoch's
            {"num_train_epochs": 2.4},
        ),
        (
            "siglip",
            {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.09},  # 1 of 7, 1 of 11
            {"max_steps": 7},
            {"max_steps": 11},
        ),
    ],
)
def test_a_completed_run_goes_on_to_more_steps_as_if_it_had_been_longer(
    train, kind, schedule, short, long
):
    run = train("run", kind, "data.validation=null", **schedule | short)
    result, steps = weights(run), record(run)["steps_done"]
    with pytest.raises(NothingToDo, match=f"its result is {run}/adapter"):
        train("run", kind, "data.validation=null", AUTO, **schedule | short)
    train("run", kind, "data.validation=null", AUTO, **schedule | long)
    undisturbed = train("long", kind, "data.validation=null", **schedule | long)
    assert are_equal(weights(run), weights(undisturbed))
    assert not are_equal(weights(run), result)
    assert history(run, "loss") == history(undisturbed, "loss")
    found = record(run)
    assert (found["status"], found["steps_done"]) == (
        "completed",
        record(undisturbed)["steps_done"],
    )
    assert [part["steps_done"] for part in found["parts"]] == [steps, found["steps_done"]]
    assert set(found["parts"][1]["changed"]) <= {"train.max_steps", "train.num_train_epochs"}


@pytest.fixture
def completed(runs, tmp_path):
    """A copy of a completed run of 8 steps, whose recipe a test may change before it goes on."""
    run = shutil.copytree(runs / "decoder", tmp_path / "run")

    def before(*words, **train):
        recipe = yaml.safe_load((run / "recipe.yaml").read_text())
        recipe["train"] |= {"output_dir": str(run), **train}
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        content = record(run)
        content["recipe"]["train"] |= train
        (run / "run.json").write_text(json.dumps(content))
        return check(run / "recipe.yaml", [AUTO, *words])

    return before


LONGER = "train.max_steps=9"
CONSTANT = {"lr_scheduler_type": "constant"}


@pytest.mark.parametrize(
    ("train", "words", "message"),
    [
        ({}, [LONGER], "expected 8 steps as the run in .* got 9: cosine spreads the learning rate"),
        ({}, ["train.max_steps=7"], "got 7: a run can only become longer"),
        (CONSTANT, ["train.max_steps=7"], "got 7: a run can only become longer"),
        (
            {"lr_scheduler_type": "constant_with_warmup"},
            ["train.max_steps=20"],
            "2 steps would have warmed up instead of 1",
        ),
        (
            CONSTANT | {"early_stopping_patience": 3},
            [LONGER],
            "early stopping counts the evaluation at the last step",
        ),
        (CONSTANT, [LONGER, "train.learning_rate=0.5"], "these keys differ: train.learning_rate"),
        ({}, ["lora.r=8"], r"these keys differ: lora.r \(4 -> 8\)"),
        ({}, ["train.seed=3"], "these keys differ: train.seed"),
        ({}, ["train.metric_for_best_model=perplexity"], "train.metric_for_best_model"),
        ({}, ["train.per_device_train_batch_size=4"], "train.per_device_train_batch_size"),
        (
            {"early_stopping_patience": 3},
            ["train.eval_steps=1", "train.per_device_eval_batch_size=5"],
            r"differ: train.eval_steps .*train.per_device_eval_batch_size",
        ),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau"},
            ["train.eval_steps=1"],
            "differ: train.eval_steps",
        ),
        (
            {},
            ["train.gradient_checkpointing_kwargs={preserve_rng_state: false}"],
            "differ: train.gradient_checkpointing_kwargs",
        ),
        (
            {"gradient_checkpointing_kwargs": {"preserve_rng_state": False}},
            ["train.gradient_checkpointing=true"],
            "differ: train.gradient_checkpointing",
        ),
    ],
    ids=str,
)
def test_what_would_change_what_was_trained_is_refused(completed, train, words, message):
    with pytest.raises(NothingToDo):
        completed(**train)
    with pytest.raises(RunError, match=message):
        completed(*words, **train)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (CONSTANT, [LONGER]),
        ({"lr_scheduler_type": "inverse_sqrt"}, [LONGER, "train.eval_strategy=steps"]),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5}, ["train.max_steps=80"]),
        (CONSTANT | {"max_steps": -1, "num_train_epochs": 0.1}, [LONGER]),
    ],
    ids=str,
)
def test_a_run_with_other_steps_to_go_is_checked_before_it_goes_on(completed, train, words):
    assert completed(*words, **train).recipe.train.max_steps != 8


def test_data_that_changed_is_said_before_a_run_is_called_completed(completed, data, tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text((data / "chat" / "train.jsonl").read_text() + "\n")
    (tmp_path / "images").symlink_to(data / "chat" / "images")
    content = record(tmp_path / "run")
    content["recipe"]["data"]["train"] = str(file)
    (tmp_path / "run" / "run.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match="expected the data of the interrupted run in"):
        completed(f"data.train={file}")


@pytest.mark.parametrize("way", ["train", "check", "script"])
def test_a_completed_run_is_one_line_and_exit_code_0(runs, medft, capsys, way, tmp_path):
    run = shutil.copytree(runs / "decoder", tmp_path / "run")
    words = [str(run / "recipe.yaml"), f"train.output_dir={run}", AUTO]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    if way == "script":
        import runpy

        main = runpy.run_path(str(ROOT / "recipes" / "decoder_qlora.py"))["main"]
        code = run_command(main, words)
    else:
        code = medft(way, *words)
    assert code == 0
    line = f"medft: the run in {run} is completed, its result is {run}/adapter"
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    shutil.rmtree(run / "checkpoint-8")  # nor is a result trained again whose checkpoints are gone
    assert medft("check", *words) == 0
    assert capsys.readouterr().err.splitlines()[-1] == line
    content = record(run)
    content["recipe"]["train"]["lr_scheduler_type"] = "constant"
    (run / "run.json").write_text(json.dumps(content))
    longer = ["train.lr_scheduler_type=constant", LONGER]
    assert medft("check", *words, *longer) == 2
    assert "to go on to step 9, found none" in capsys.readouterr().err


@pytest.mark.slow
def test_one_command_line_starts_a_run_and_goes_on_with_it(train, tmp_path):
    undisturbed = train("whole", "siglip", save_steps=4)
    run, file = tmp_path / "run", tmp_path / "run.yaml"
    recipe = yaml.safe_load((tmp_path / "whole.yaml").read_text())
    file.write_text(yaml.safe_dump(recipe | {"train": recipe["train"] | {"output_dir": str(run)}}))
    for step in (3, 6, 11):
        words = [sys.executable, SIGNALLED, "SIGKILL", str(step), "siglip", file, AUTO]
        killed = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
        assert killed.returncode == -9, killed.stderr
        assert (run / ".lock").is_file()
        (run / "best_model").mkdir(exist_ok=True)  # as of an evaluation before the first save
        (run / "best_model" / "dead").touch()
        assert not (run / "adapter").exists()
    train("run", "siglip", AUTO, save_steps=4)
    assert are_equal(weights(run), weights(undisturbed))
    assert history(run, "loss") == history(undisturbed, "loss")
    assert history(run, "eval_loss") == history(undisturbed, "eval_loss")
    assert record(run)["best_metric"] == record(undisturbed)["best_metric"]
    best, other = (r / "best_model" / "adapter_model.safetensors" for r in (run, undisturbed))
    assert best.read_bytes() == other.read_bytes()
    assert not (run / ".lock").exists()
    parts = record(run)["parts"]
    assert [part["from_step"] for part in parts] == [0, 0, 4, 8]
    assert [part["status"] for part in parts] == ["running"] * 3 + ["completed"]
    assert [part.get("saved_step") for part in parts] == [None, 4, 8, 12]
    assert parts[-1]["argv"][-1] == AUTO
    assert record(run)["started"] == parts[0]["started"]


@pytest.mark.slow
def test_best_model_and_its_metric_agree_whatever_is_evaluated_after_a_stop(train):
    when = {"max_steps": 8, "save_steps": 4, "eval_strategy": "steps"}
    run = train("run", "siglip", **when, eval_steps=2)
    evaluation = json.loads((run / "best_model" / "evaluation.json").read_text())
    losses = history(run, "eval_loss")
    best = min(losses, key=losses.__getitem__)
    assert evaluation == {"step": best, "metric": "eval_loss", "value": losses[best]}
    assert record(run)["best_metric"] == losses[best]
    lose_checkpoints(run, after=4)
    evaluation |= {"step": 6, "value": losses[best] / 9}  # as if no later model were as good
    (run / "best_model" / "evaluation.json").write_text(json.dumps(evaluation))
    (run / "best_model" / "mark").touch()
    train("run", "siglip", RESUME, **when, eval_steps=5)
    assert list(history(run, "eval_loss")) == [2, 4, 5, 8]
    assert (run / "best_model" / "mark").exists()
    assert record(run)["best_metric"] == evaluation["value"]
    lose_checkpoints(run, after=4)
    (run / "best_model" / "evaluation.json").write_text(json.dumps(evaluation | {"step": 3}))
    train("run", "siglip", RESUME, **when, eval_steps=5)
    assert not (run / "best_model" / "mark").exists()
    assert record(run)["best_metric"] == min(history(run, "eval_loss").values())


@pytest.mark.slow
def test_the_evaluation_at_an_epochs_end_is_in_the_checkpoint_of_its_last_step(train):
    epochs = {"eval_strategy": "epoch", "eval_steps": None}
    run = train("run", "siglip", max_steps=7, save_steps=5, **epochs)
    losses = history(run, "eval_loss")
    assert list(losses) == [5, 7]
    for step in (5, 7):
        state = json.loads((run / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["log_history"][-1]["eval_loss"] == losses[step]
    lose_checkpoints(run, after=5)
    train("run", "siglip", RESUME, max_steps=7, save_steps=5, **epochs)
    assert history(run, "eval_loss") == losses


def script(*words):
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("later", [0, pytest.param(0.5, marks=pytest.mark.proof), 2])
def test_of_two_runs_into_one_folder_one_trains(sections, write_recipe, tmp_path, later):
    recipe = sections("siglip")
    recipe["train"]["max_steps"] = 40
    file = write_recipe(recipe)
    first = script("recipes/siglip_lora.py", file)
    time.sleep(later)
    second = script("recipes/siglip_lora.py", file)
    texts = [process.communicate()[1] for process in (first, second)]
    codes = [first.returncode, second.returncode]
    assert sorted(codes) == [0, 2], texts
    winner = (first, second)[codes.index(0)]
    said = texts[codes.index(2)].splitlines()
    assert said == [line for line in said if "Traceback" not in line]
    [line] = [line for line in said if line.startswith("medft: error: ")]
    assert re.fullmatch(
        rf"medft: error: expected no other run in {tmp_path}/run, process {winner.pid} on \S+ has "
        r"trained there since \S+: wait for it or stop it, or choose another train\.output_dir",
        line,
    )
    assert record(tmp_path / "run")["status"] == "completed"
    assert [part["from_step"] for part in record(tmp_path / "run")["parts"]] == [0]
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.slow
def test_every_process_of_a_start_learns_that_another_run_has_the_folder(
    sections, write_recipe, tmp_path
):
    file = write_recipe(sections("siglip"))
    words = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    with closing(RunLock(tmp_path / "run")) as lock:
        lock.take()
        refused = script(*words, "recipes/siglip_lora.py", file)
        text = refused.communicate(timeout=120)[1]
    assert refused.returncode != 0
    assert text.count("medft: error: expected no other run in") == 1
    assert text.count("Traceback") <= 1  # the launcher's
    assert "exitcode : 2" in " ".join(text.replace(":", " : ").split())
    assert not (tmp_path / "run").exists()
