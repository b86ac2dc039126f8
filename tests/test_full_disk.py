"""A full disk is called so whichever library met it, and nothing else is."""

import errno
import json
from pathlib import Path

import pytest
import torch
from small_disk import on_small_disk

from medft.errors import DataError, run_command
from medft.files import replaced_file
from medft.full_disk import is_disk_full, named_file

FILLING = Path(__file__).parent / "filling.py"


def raised(function):
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("it raised nothing")


@pytest.mark.slow
def test_what_every_library_raises_on_a_full_disk_is_known(tmp_path):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(b"a" * 2_000_000)
    ended = on_small_disk(tmp_path / "disk", 1000, FILLING, tmp_path / "disk", tmp_path / "tree")
    found = json.loads(ended.error.splitlines()[-1])
    assert len(found) == 9
    assert set(found.values()) == {True}, found


def test_a_full_disk_is_known_by_its_number_or_its_words():
    for number in (errno.ENOSPC, errno.EDQUOT):
        assert is_disk_full(OSError(number, "no"))
    assert is_disk_full(RuntimeError("write(): fd 3 failed with No space left on device"))

    def wrapped():
        try:
            raise OSError(errno.ENOSPC, "no", "a.txt")
        except OSError as error:
            raise ValueError("a message of a library") from error

    error = raised(wrapped)
    assert is_disk_full(error)
    assert named_file(error) == "a.txt"


def test_what_is_something_else_is_not_called_a_full_disk(tmp_path):
    assert not is_disk_full(OSError(errno.EACCES, "No space left on device"))
    assert not is_disk_full(DataError("row 3 says: No space left on device"))
    shared = "unable to allocate shared memory(shm) for file </torch_1>: No space left on device"
    assert not is_disk_full(RuntimeError(shared))
    # torch.save has the same words for it, and there is room
    failed = raised(lambda: torch.save({"a": torch.zeros(9)}, tmp_path / "missing" / "file"))
    assert not is_disk_full(failed, tmp_path)
    for words in ("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534",
                  "basic_ios::clear: iostream error"):  # fmt: skip
        assert not is_disk_full(RuntimeError(words), tmp_path)

    def handled():
        try:
            raise OSError(errno.ENOSPC, "no")
        except OSError:
            raise ValueError("of its own") from None

    assert not is_disk_full(raised(handled))


def test_a_command_names_the_file_that_has_no_room(tmp_path, capsys):
    def fill(words):
        with replaced_file(tmp_path / "a.json"):
            raise OSError(errno.ENOSPC, "No space left on device")

    assert run_command(fill, []) == 2
    assert capsys.readouterr().err == (
        f"medft: error: expected room to write {tmp_path / 'a.json'}, its disk is full: make "
        f"room, and start again\n"
    )
    with pytest.raises(OSError, match="No space left"):
        run_command(fill, ["--debug"])
