"""Only whole checkpoints are resumed from, and folders appear complete or not at all."""

import contextlib
import json
import logging
import pickle

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from medft.errors import RunError
from medft.training.callbacks import CheckpointManifestCallback
from medft.training.checkpoints import (
    checkpoint_to_resume,
    checkpoints_of,
    step_of,
    what_is_missing,
    world_size_of,
    write_manifest,
)

CONTROL = (
    "should_training_stop",
    "should_epoch_stop",
    "should_save",
    "should_evaluate",
    "should_log",
)
STATE = {
    "epoch": 0.5,
    "global_step": 20,
    "max_steps": 20,
    "train_batch_size": 2,
    "log_history": [{"step": 5, "loss": 2.5}],
    "stateful_callbacks": {
        "TrainerControl": {"args": dict.fromkeys(CONTROL, False), "attributes": {}}
    },
}
"""What Trainer saves, of which medft reads more."""

FILES = ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]


@pytest.fixture
def run(tmp_path):
    """A run with three whole checkpoints."""
    for step in (5, 10, 20):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in FILES:
            torch.save({name: torch.zeros(9)}, folder / name)
        (folder / "trainer_state.json").write_text(json.dumps(STATE | {"global_step": step}))
        write_manifest(folder, world_size=1)
    return tmp_path


def test_the_newest_whole_checkpoint_is_taken(run):
    assert checkpoint_to_resume(run, True).name == "checkpoint-20"
    assert checkpoint_to_resume(run, None) is None
    assert checkpoint_to_resume(run, False) is None
    assert [path.name for path in checkpoints_of(run)] == [
        "checkpoint-20",
        "checkpoint-10",
        "checkpoint-5",
    ]
    assert world_size_of(run / "checkpoint-10") == 1


@pytest.mark.parametrize("name", [*FILES, "trainer_state.json", "manifest.json"])
def test_a_missing_file_is_named_and_the_next_older_checkpoint_is_taken(run, caplog, name):
    (run / "checkpoint-20" / name).unlink()
    with caplog.at_level(logging.WARNING, logger="medft"):
        assert checkpoint_to_resume(run, True).name == "checkpoint-10"
    assert "skipped checkpoint-20" in caplog.text
    assert name in caplog.text


@pytest.mark.parametrize("change", [lambda b: b[:-3], lambda b: b"x" + b[1:], lambda b: b + b"x"])
def test_a_truncated_or_changed_file_is_found(run, change):
    path = run / "checkpoint-20" / "optimizer.pt"
    path.write_bytes(change(path.read_bytes()))
    assert "optimizer.pt is not what was saved" in what_is_missing(run / "checkpoint-20")
    assert checkpoint_to_resume(run, True).name == "checkpoint-10"


def test_a_save_that_never_wrote_a_state_is_not_whole(run):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        folder = run / "checkpoint-20"
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        write_manifest(folder, world_size=1)
        assert what_is_missing(folder).startswith("it holds no ")
        (folder / name).write_bytes(content)


def test_a_path_that_is_not_whole_is_an_error_not_a_fallback(run):
    assert checkpoint_to_resume(run, str(run / "checkpoint-5")) == run / "checkpoint-5"
    (run / "checkpoint-5" / "optimizer.pt").unlink()
    with pytest.raises(RunError, match=r"optimizer\.pt is missing"):
        checkpoint_to_resume(run, str(run / "checkpoint-5"))


def test_nothing_whole_is_an_error(run):
    for path in checkpoints_of(run):
        (path / "manifest.json").unlink()
    with pytest.raises(RunError, match="found none"):
        checkpoint_to_resume(run, True)


class Marks:
    """Unpickling it would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


PICKLES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "pytorch_model.bin",
           "global_step20/a_optim_states.pt"]  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("form", ["torch", "pickle", "protocol 4"])
def test_a_checkpoint_that_would_run_code_is_refused_though_its_manifest_fits(run, name, form):
    mark = run / "mark"
    file = run / "checkpoint-20" / name
    file.parent.mkdir(exist_ok=True)
    if form == "pickle":
        file.write_bytes(pickle.dumps(Marks(mark)))
    else:
        torch.save({"state": Marks(mark)}, file, pickle_protocol=4 if form == "protocol 4" else 2)
    write_manifest(run / "checkpoint-20", world_size=1)
    assert name in what_is_missing(run / "checkpoint-20")
    assert checkpoint_to_resume(run, True).name == "checkpoint-10"
    with pytest.raises(RunError, match=r"would run code that it names|that torch\.save writes"):
        checkpoint_to_resume(run, str(run / "checkpoint-20"))
    assert not mark.exists()
    with contextlib.suppress(pickle.UnpicklingError, RuntimeError):
        torch.load(file, weights_only=False)
    assert mark.exists()  # the file does what it is for


def test_the_pickle_that_trainer_never_reads_is_no_reason(run):
    (run / "checkpoint-20" / "training_args.bin").write_bytes(pickle.dumps(Marks(run / "mark")))
    write_manifest(run / "checkpoint-20", world_size=1)
    assert what_is_missing(run / "checkpoint-20") is None


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("trainer_state.json", "[]"),
        ("adapter_config.json", '{"auto_mapping": {"parent_library": "os"}}'),
        ("latest", "../../elsewhere"),
    ],
)
def test_a_checkpoint_with_foreign_content_is_refused_though_its_manifest_fits(run, file, content):
    (run / "checkpoint-20" / file).write_text(content)
    write_manifest(run / "checkpoint-20", world_size=1)
    with pytest.raises(RunError, match=r"expected a complete checkpoint at"):
        checkpoint_to_resume(run, str(run / "checkpoint-20"))
    assert checkpoint_to_resume(run, True).name == "checkpoint-10"


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": [1, 2]}}',
     '{"files": {"a\\u0000": [1, "x"]}, "world_size": 1}', '{"files": {}, "world_size": "1"}'],
)  # fmt: skip
def test_a_manifest_of_other_types_is_none(run, content):
    (run / "checkpoint-20" / "manifest.json").write_text(content)
    assert "no readable manifest" in what_is_missing(run / "checkpoint-20")


def with_callback(name, **content):
    return {**STATE["stateful_callbacks"], name: content}


STOPPING = {"early_stopping_patience": 2, "early_stopping_threshold": 0.0}
COUNTER = {"early_stopping_patience_counter": 1}
FOREIGN_STATE = [
    {"global_step": "20"}, {"global_step": 10**9, "max_steps": 10**9}, {"global_step": -5},
    {"global_step": 10}, {"global_step": True}, {"max_steps": 0}, {"max_steps": 10**400},
    {"epoch": "x"}, {"epoch": None}, {"epoch": -1}, {"epoch": 1e300}, {"epoch": float("nan")},
    {"best_metric": "x"}, {"best_metric": 10**400}, {"best_metric": float("nan")},
    {"best_model_checkpoint": 5}, {"total_flos": "x"}, {"save_steps": 0}, {"logging_steps": "x"},
    {"eval_steps": -1},
    {"num_input_tokens_seen": -1}, {"trial_params": {}},
    {"train_batch_size": None}, {"no": 1},
    {"log_history": [{"step": 5, "loss": "x"}]}, {"log_history": [{"loss": 2.5}]},
    {"log_history": [{"step": 5, "loss": 10**400}]},
    {"stateful_callbacks": None}, {"stateful_callbacks": {}}, {"stateful_callbacks": {"a": 1}},
    {"stateful_callbacks": with_callback("PrinterCallback", args={}, attributes={"on_log": 1})},
    {"stateful_callbacks": with_callback("TrainerControl", args={"a": True}, attributes={})},
    {"stateful_callbacks": with_callback("TrainerControl", args={}, attributes={"state": 1})},
    {"stateful_callbacks": with_callback("EarlyStoppingCallback", args=STOPPING,
                                         attributes={"early_stopping_patience_counter": "x"})},
]  # fmt: skip


@pytest.mark.parametrize("changes", FOREIGN_STATE, ids=str)
def test_a_state_that_trainer_never_saves_is_refused_though_its_manifest_fits(run, changes):
    (run / "checkpoint-20" / "trainer_state.json").write_text(json.dumps(STATE | changes))
    write_manifest(run / "checkpoint-20", world_size=1)
    assert "trainer_state.json" in what_is_missing(run / "checkpoint-20")
    assert checkpoint_to_resume(run, True).name == "checkpoint-10"


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": 3, "best_metric": 2.5, "best_model_checkpoint": "somewhere"},
        {"log_history": [{"step": 5, "loss": float("nan")}]},
        {
            "stateful_callbacks": with_callback(
                "EarlyStoppingCallback", args=STOPPING, attributes=COUNTER
            )
        },
    ],
    ids=str,
)
def test_a_state_that_trainer_may_save_is_taken(run, changes):
    (run / "checkpoint-20" / "trainer_state.json").write_text(json.dumps(STATE | changes))
    write_manifest(run / "checkpoint-20", world_size=1)
    assert checkpoint_to_resume(run, True).name == "checkpoint-20"


@pytest.mark.parametrize(
    "name", ["checkpoint-\u00b2", "checkpoint-\u0663", "checkpoint-", "checkpoint-x"]
)
def test_a_name_without_a_number_in_ascii_is_no_checkpoint(run, name):
    (run / name).mkdir()
    assert len(checkpoints_of(run)) == 3
    assert checkpoint_to_resume(run, True).name == "checkpoint-20"


def test_a_checkpoint_under_the_name_of_another_step_is_refused(run):
    (run / "checkpoint-20").rename(run / "checkpoint-30")
    assert what_is_missing(run / "checkpoint-30") == "its trainer_state.json is of step 20"
    assert checkpoint_to_resume(run, True).name == "checkpoint-10"


def test_a_limit_never_deletes_the_checkpoint_that_was_just_saved(tmp_path):
    """A run that goes on leaves later checkpoints, which are not complete, where they are."""
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    for limit, kept in ((1, [4]), (2, [3, 4])):
        for step in (1, 2, 3, 4, 6, 8):
            (tmp_path / f"checkpoint-{step}").mkdir(exist_ok=True)
        callback = CheckpointManifestCallback(limit)
        callback.on_save(arguments, TrainerState(global_step=4), TrainerControl())
        left = sorted(step_of(path) for path in checkpoints_of(tmp_path))
        assert left == [*kept, 6, 8]
        assert (tmp_path / "checkpoint-4" / "manifest.json").is_file()
