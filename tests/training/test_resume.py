"""What must hold before a run begins in its folder."""

import json
import os
import shutil
from contextlib import closing

import pytest
import torch
import yaml

from medft.check import check
from medft.config.train_keys import TrainSection
from medft.errors import MedftError, RunError
from medft.models.saved import RunLayout
from medft.training.checkpoints import write_manifest
from medft.training.resume import check_output_dir, clear_output_dir
from medft.training.run_lock import RunLock
from medft.training.same_run import check_state

BEST = {"eval_strategy": "steps", "eval_steps": 1}


def test_a_folder_that_holds_something_is_not_written_into(tmp_path):
    assert check_output_dir(TrainSection(output_dir=str(tmp_path / "new"))) is None
    assert check_output_dir(TrainSection(output_dir=str(tmp_path))) is None
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="or resume with"):
        check_output_dir(TrainSection(output_dir=str(tmp_path)))
    with pytest.raises(RunError, match="is a file"):
        check_output_dir(TrainSection(output_dir=str(tmp_path / "file")))
    with pytest.raises(RunError, match="found none"):
        check_output_dir(TrainSection(output_dir=str(tmp_path), resume_from_checkpoint=True))


@pytest.fixture
def resumed(tmp_path):
    """The section of a run whose checkpoint-2 is complete."""
    folder = tmp_path / "run" / "checkpoint-2"
    folder.mkdir(parents=True)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({}, folder / name)
    control = {"TrainerControl": {"args": {}, "attributes": {}}}
    state = {"epoch": 0.5, "global_step": 2, "max_steps": 4, "train_batch_size": 1}
    state |= {"log_history": [], "stateful_callbacks": control}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    write_manifest(folder, world_size=1)
    return TrainSection(output_dir=str(tmp_path / "run"), resume_from_checkpoint=True)


FILES = ["run.json", "recipe.yaml", "log_history.json", "curves.png"]
FOLDERS = ["adapter", "model", "best_model", ".adapter.old", "runs", "checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("name", [*FILES, *(f".{name}.draft" for name in FILES)])
def test_a_folder_in_place_of_a_file_is_found_before_training(resumed, tmp_path, name):
    (tmp_path / "run" / name).write_text("x")
    assert check_output_dir(resumed).name == "checkpoint-2"
    (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / name).mkdir()
    with pytest.raises(RunError, match=f"a file at .*{name}, there is a folder"):
        check_output_dir(resumed)


@pytest.mark.parametrize("name", [*FOLDERS, ".adapter.draft", ".model.draft", ".best_model.draft"])
def test_a_file_in_place_of_a_folder_is_found_before_training(resumed, tmp_path, name):
    (tmp_path / "run" / name).mkdir()
    assert check_output_dir(resumed).name == "checkpoint-2"
    (tmp_path / "run" / name).rmdir()
    (tmp_path / "run" / name).write_text("x")
    with pytest.raises(RunError, match=f"a folder at .*{name}, there is a file"):
        check_output_dir(resumed)


def test_a_link_to_a_checkpoint_is_no_checkpoint(resumed, tmp_path):
    (tmp_path / "run" / "checkpoint-4").symlink_to("checkpoint-2")
    with pytest.raises(RunError, match="checkpoint-4 is a link"):
        check_output_dir(resumed)


def test_files_that_would_be_written_through_a_hard_link_are_found(resumed, tmp_path):
    shutil.copytree(tmp_path / "run", tmp_path / "backup", copy_function=os.link)
    assert check_output_dir(resumed).name == "checkpoint-2"  # which is only read
    later = tmp_path / "run" / "checkpoint-4"
    later.mkdir()
    (later / "optimizer.pt").write_text("of a save that did not end")
    assert check_output_dir(resumed).name == "checkpoint-2"
    os.link(later / "optimizer.pt", tmp_path / "backup" / "optimizer.pt")
    with pytest.raises(RunError, match=r"optimizer\.pt has another name elsewhere"):
        check_output_dir(resumed)
    (later / "optimizer.pt").unlink()
    (later / "optimizer.pt").mkdir()
    with pytest.raises(RunError, match=r"optimizer\.pt is a folder"):
        check_output_dir(resumed)


def test_a_state_of_another_plan_is_not_followed(resumed, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint-2"
    check_state(resumed, checkpoint, steps=4)
    for steps in (1, 2, 5):
        with pytest.raises(RunError, match=f"has step 2 of 4, not of {steps}"):
            check_state(resumed, checkpoint, steps=steps)
    patient = TrainSection(output_dir=str(tmp_path), early_stopping_patience=3, **BEST)
    with pytest.raises(RunError, match="stops early by None, not by"):
        check_state(patient, checkpoint, steps=4)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["stateful_callbacks"]["EarlyStoppingCallback"] = {
        "args": {"early_stopping_patience": 3, "early_stopping_threshold": 0.0},
        "attributes": {"early_stopping_patience_counter": 0},
    }
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    check_state(patient, checkpoint, steps=4)
    with pytest.raises(RunError, match="not by None"):
        check_state(resumed, checkpoint, steps=4)


def test_a_run_resumes_that_was_begun_before_a_key_of_lora_was_listed(runs, tmp_path):
    """Its record says nothing of keys that are null now, and what it does say is compared."""
    run = shutil.copytree(runs / "decoder", tmp_path / "run")
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "best_model")
    record = json.loads((run / "run.json").read_text())
    begun = {key: record["recipe"]["lora"][key] for key in ("r", "alpha", "dropout", "targets")}
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"lora": begun}))
    words = [f"train.output_dir={run}", "train.resume_from_checkpoint=true"]
    for written in ({}, {"init_from": None, "exclude_modules": None}):
        record["recipe"]["lora"] = begun | written
        (run / "run.json").write_text(json.dumps(record))
        assert check(run / "recipe.yaml", words).recipe.lora.use_dora is None
    record["recipe"]["lora"] = begun | {"use_dora": True}
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"lora\.use_dora \(True -> None\)"):
        check(run / "recipe.yaml", words)


def auto(folder):
    return TrainSection(output_dir=str(folder), resume_from_checkpoint="auto")


def test_auto_starts_where_no_run_has_saved(tmp_path, resumed):
    assert check_output_dir(auto(tmp_path / "new")) is None
    (tmp_path / "empty").mkdir()
    assert check_output_dir(auto(tmp_path / "empty")) is None
    (tmp_path / "empty" / ".run.json.draft").write_text("{")  # of a start that was killed
    assert check_output_dir(auto(tmp_path / "empty")) is None
    (tmp_path / "empty" / "thesis.tex").write_text("years")
    with pytest.raises(RunError, match=r"is not and holds no run\.json: choose another folder$"):
        check_output_dir(auto(tmp_path / "empty"))
    assert (tmp_path / "empty" / "thesis.tex").is_file()


@pytest.fixture
def begun(runs, tmp_path):
    """A run that was killed before it had saved, with what it left."""
    run = shutil.copytree(runs / "decoder", tmp_path / "begun")
    shutil.rmtree(run / "adapter")
    (run / "checkpoint-8" / "manifest.json").unlink()
    record = json.loads((run / "run.json").read_text())
    for entries in (record, record["parts"][-1]):
        entries["status"] = "running"
        del entries["saved_step"], entries["steps_done"]
    (run / "run.json").write_text(json.dumps(record))
    return run


def test_auto_starts_afresh_only_if_nothing_was_ever_saved(begun, caplog):
    assert check_output_dir(auto(begun)) is None
    before = sorted(begun.rglob("*"))
    clear_output_dir(RunLayout(begun))
    assert sorted(path.name for path in begun.iterdir()) == ["recipe.yaml", "run.json"]
    assert len(before) > 20
    with pytest.raises(RunError, match="found none"):
        check_output_dir(TrainSection(output_dir=str(begun), resume_from_checkpoint=True))


@pytest.mark.parametrize(
    "trace", ["manifest", "saved_step", "earlier part", "older record", "completed"]
)
def test_auto_never_starts_afresh_where_something_was_saved(begun, trace):
    record = json.loads((begun / "run.json").read_text())
    if trace == "manifest":
        (begun / "checkpoint-8" / "manifest.json").write_text("{}")
    elif trace == "saved_step":
        record["parts"][0]["saved_step"] = 4
    elif trace == "completed":  # its result was moved, best_model/ was not
        record["status"] = "completed"
    elif trace == "earlier part":
        record["parts"].append({"started": "x", "from_step": 4})
    else:
        del record["parts"]
        record |= {"resumed": ["then"], "resumed_from_steps": [4]}
    (begun / "run.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"expected a complete checkpoint in .*, found none"):
        check_output_dir(auto(begun))


def test_auto_goes_on_from_the_newest_complete_checkpoint(resumed, runs, tmp_path):
    run = tmp_path / "run"
    shutil.copyfile(runs / "decoder" / "run.json", run / "run.json")
    (run / "checkpoint-4").mkdir()
    assert check_output_dir(auto(run)).name == "checkpoint-2"


def test_nothing_is_written_into_a_base(sections, write_recipe, bases, tmp_path):
    recipe = sections("decoder")
    recipe["model"]["base"] = str(shutil.copytree(bases / "decoder", tmp_path / "base"))
    (tmp_path / "link").symlink_to("base")
    file = write_recipe(recipe)
    check(file, [])
    for folder in ("base", "base/run", "link/run", "other/../base/run"):
        with pytest.raises(MedftError, match=r"expected train\.output_dir outside of model\.base"):
            check(file, [f"train.output_dir={tmp_path / folder}"])
        with pytest.raises(
            MedftError, match=r"expected model\.vision_cache outside of model\.base"
        ):
            check(file, [f"model.vision_cache={tmp_path / folder}"])
    check(file, [f"train.output_dir={tmp_path / 'base2'}"])


def test_a_refused_start_leaves_the_folder_as_it_was(sections, write_recipe, run_script, tmp_path):
    file = write_recipe(sections("decoder"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years")
    with pytest.raises(RunError, match="to be empty"):
        run_script("decoder", file)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]
    with pytest.raises(MedftError):
        run_script("decoder", file, f"train.output_dir={tmp_path}/a/b", "data.train=missing.jsonl")
    assert not (tmp_path / "a").exists()


def test_check_says_that_a_run_is_going_on(sections, write_recipe, tmp_path):
    file = write_recipe(sections("decoder"))
    with closing(RunLock(tmp_path / "run")) as lock:
        lock.take()
        with pytest.raises(MedftError, match=f"process {os.getpid()} on .* has trained there"):
            check(file, [])
    check(file, [])
