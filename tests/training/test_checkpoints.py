"""Only whole checkpoints are resumed from, and folders appear complete or not at all."""

import logging

import pytest

from medft.errors import RunError
from medft.training.checkpoints import (
    checkpoint_to_resume,
    checkpoints_of,
    what_is_missing,
    world_size_of,
    write_manifest,
)

FILES = ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]


@pytest.fixture
def run(tmp_path):
    """A run with three whole checkpoints."""
    for step in (5, 10, 20):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in FILES:
            (folder / name).write_bytes(name.encode() * 9)
        (folder / "trainer_state.json").write_text("{}")
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
