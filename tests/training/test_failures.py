"""What goes from a run directory as its run ends, and what stays."""

import errno
from contextlib import closing
from pathlib import Path

import pytest

from medft.errors import RunError
from medft.training.failures import cleared
from medft.training.run_lock import LOCK_FILE, RunLock

STAYS = {
    "checkpoint-2/manifest.json", "checkpoint-2/optimizer.pt", "checkpoint-old/optimizer.pt",
    "checkpoint-3.bak/optimizer.pt", "best_model/weights", ".best_model.old/weights", "run.json",
    ".draft/file", "thesis.draft",
}  # fmt: skip
GOES = {"checkpoint-4/optimizer.pt", ".adapter.draft/weights", ".run.json.draft"}


@pytest.fixture
def lock(tmp_path):
    """The lock of a run directory that holds all of these."""
    with closing(RunLock(tmp_path / "run")) as lock:
        lock.take()
        for name in STAYS | GOES:
            (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "run" / name).touch()
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "weights").touch()
        (tmp_path / "run" / ".model.draft").symlink_to("../elsewhere")
        (tmp_path / "run" / "checkpoint-6").symlink_to("../elsewhere")
        yield lock


def fail(run, lock):
    """End a run by an error."""
    with pytest.raises(RunError, match="of its own"), cleared(run, lock):
        raise RunError("of its own")


def files(run):
    found = (path for path in run.rglob("*") if path.is_file())
    return {path.relative_to(run).as_posix() for path in found} - {LOCK_FILE}


def test_what_is_not_complete_goes_and_all_else_stays(tmp_path, lock):
    fail(tmp_path / "run", lock)
    assert files(tmp_path / "run") == STAYS
    assert (tmp_path / "elsewhere" / "weights").is_file()


def test_nothing_goes_from_the_folder_of_another_run(tmp_path, lock):
    lock.path.write_text("another's")
    fail(tmp_path / "run", lock)
    assert files(tmp_path / "run") == STAYS | GOES | {".reserve.draft"}


def test_a_disk_that_cannot_be_written_hides_no_error(tmp_path, lock, monkeypatch):
    def unlink(path, **options):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        fail(tmp_path / "run", lock)
    assert files(tmp_path / "run") >= STAYS
