"""When checkpoints and evaluations come is said beforehand, as Trainer does it."""

import json
import math
import re
import shutil

import pytest
from straight_line import Line, Squares
from transformers import Trainer, TrainingArguments

from medft.training.arguments import batch_arithmetic
from medft.training.checkpoints import checkpoints_of, step_of
from medft.training.schedule import Schedule, schedule

ROWS = 22


def evaluated(history):
    return [entry["step"] for entry in history if "eval_runtime" in entry]


@pytest.mark.parametrize(
    "options",
    [
        {"save_steps": 0.1, "eval_steps": 0.1, "num_train_epochs": 3},
        {"save_steps": 0.3, "eval_steps": 0.45, "max_steps": 7},
        {"save_steps": 4, "eval_steps": 5, "eval_delay": 6},
        {"save_steps": 99, "eval_steps": 99, "eval_on_start": True},
        {"save_strategy": "epoch", "eval_strategy": "epoch", "num_train_epochs": 2.5},
        {"save_strategy": "epoch", "eval_strategy": "epoch", "max_steps": 15, "eval_delay": 2},
        {"save_strategy": "no", "eval_strategy": "no"},
    ],
)
def test_the_steps_are_trainers(tmp_path, options):
    common = {"per_device_train_batch_size": 4, "eval_strategy": "steps", "num_train_epochs": 2}
    common |= {"report_to": "none", "use_cpu": True, "save_only_model": False}
    arguments = TrainingArguments(tmp_path, **{**common, **options})
    trainer = Trainer(Line(), arguments, train_dataset=Squares(ROWS), eval_dataset=Squares(2))
    batch = batch_arithmetic(math.ceil(ROWS / 4), arguments)
    sizes = {"steps": batch["steps"], "steps_per_epoch": batch["steps_per_epoch"]}
    plan = schedule(arguments, **sizes)
    trainer.train()
    saved = sorted(map(step_of, checkpoints_of(tmp_path)))
    assert plan.checkpoints == saved
    assert plan.evaluations == evaluated(trainer.state.log_history)
    resumed = schedule(arguments, **sizes, start=5)
    assert resumed.checkpoints == [step for step in saved if step > 5]
    assert resumed.evaluations == [step for step in plan.evaluations if step > 5]


@pytest.mark.slow
def test_check_and_the_start_say_the_steps_of_a_run_and_of_its_resumption(
    sections, write_recipe, run_script, medft, capsys, caplog
):
    recipe = sections("siglip")
    recipe["train"] |= {"max_steps": 13, "save_steps": 4, "logging_steps": 13}
    del recipe["train"]["eval_steps"]
    file = write_recipe(recipe)
    run = file.with_suffix("")
    said = (
        "checkpoints: steps 4, 8, 12 and 13, the end",
        "evaluations: steps 2, 4, ... 12 and 13, the end",
    )
    assert medft("check", file) == 0
    assert "\n".join(said) in capsys.readouterr().out
    caplog.set_level("INFO", logger="medft")
    run_script("siglip", file)
    assert "; ".join(said) in caplog.text
    assert sorted(map(step_of, checkpoints_of(run))) == [4, 8, 12, 13]
    history = json.loads((run / "log_history.json").read_text())
    assert evaluated(history) == [2, 4, 6, 8, 10, 12, 13]
    metrics = json.loads((run / "run.json").read_text())["metrics"]
    [last] = [entry for entry in history if entry["step"] == 13 and "eval_loss" in entry]
    assert metrics["eval_loss"] == last["eval_loss"]

    for step in (12, 13):
        shutil.rmtree(run / f"checkpoint-{step}")
    shutil.rmtree(run / "adapter")
    caplog.clear()
    resume = "train.resume_from_checkpoint=true"
    assert medft("check", file, resume) == 0
    rest = ("checkpoints: steps 12 and 13, the end", "evaluations: steps 10, 12 and 13, the end")
    assert "\n".join(rest) in capsys.readouterr().out
    run_script("siglip", file, resume)
    assert "; ".join(rest) in caplog.text
    assert sorted(map(step_of, checkpoints_of(run))) == [4, 8, 12, 13]
    assert evaluated(json.loads((run / "log_history.json").read_text())) == [2, 4, 6, 8, 10, 12, 13]


def plan(checkpoints, *, evaluations=(), start=0):
    return Schedule(checkpoints=checkpoints, evaluations=[*evaluations], start=start, end=165)


@pytest.mark.parametrize(
    ("known", "lost"),
    [
        (plan([17, 165]), None),
        (plan([165]), "from the beginning, unless you lower train.save_steps"),
        (plan([165], start=20), "again from step 20, unless you lower train.save_steps"),
        (plan([]), "from the beginning, unless you change train.save_strategy"),
    ],
)
def test_a_run_that_could_lose_everything_is_told_so(known, lost):
    *_, last = known.sentences()
    assert last.startswith("a run that is killed before its end") == (lost is not None)
    assert last.endswith(lost or "evaluations: none")


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        ([*range(17, 165, 17), 165], "steps 17, 34, ... 153 and 165, the end"),
        ([165], "step 165, the end"),
        ([33, 99], "steps 33 and 99"),
        ([], "none"),
    ],
)
def test_long_lists_are_shortened(steps, text):
    [said, *_] = plan(steps, evaluations=steps).sentences()
    assert re.fullmatch("checkpoints and evaluations: (.*)", said)[1] == text
