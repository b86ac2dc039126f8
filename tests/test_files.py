"""Output is complete or not there, and one process writes it at a time."""

import contextlib
import errno
import json
import os
import stat
from pathlib import Path

import pytest

from medft.errors import RunError
from medft.files import (
    check_folder_for_output,
    check_place,
    complete_files,
    complete_folder,
    finish_swap,
    replaced_bytes,
    replaced_file,
    write_json,
)


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    target = tmp_path / "result"
    with complete_folder(target) as draft:
        (draft / "a").write_text("1")
        assert not target.exists()
    with contextlib.suppress(KeyboardInterrupt), complete_folder(target) as draft:
        (draft / "a").write_text("2")
        raise KeyboardInterrupt
    assert (target / "a").read_text() == "1"
    with complete_folder(target) as draft:
        (draft / "b").write_text("3")
    assert {path.name for path in target.iterdir()} == {"b"}
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {"result"}


def test_json_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}


WRITERS = pytest.mark.parametrize("writer", [complete_files, complete_folder])


@WRITERS
def test_a_second_process_is_refused_and_the_first_one_ends(tmp_path, writer):
    with writer(tmp_path / "out") as draft:
        with (
            pytest.raises(RunError, match=r"no other process that writes .*out, there is one"),
            writer(tmp_path / "out"),
        ):
            pytest.fail("two processes write the same folder")
        (draft / "a").write_text("first")
    assert (tmp_path / "out" / "a").read_text() == "first"
    with writer(tmp_path / "out") as draft:
        (draft / "a").write_text("second")
    assert (tmp_path / "out" / "a").read_text() == "second"
    assert {path.name for path in tmp_path.rglob("*")} == {"out", "a"}


@WRITERS
@pytest.mark.parametrize("is_full", [True, False])
def test_a_block_that_fails_leaves_nothing(tmp_path, writer, is_full):
    problem = OSError(errno.ENOSPC if is_full else errno.EACCES, "no")
    expected = (
        pytest.raises(RunError, match="its disk is full")
        if is_full
        else pytest.raises(OSError, match="no")
    )
    with expected, writer(tmp_path / "out") as draft:
        (draft / "a").write_text("1")
        raise problem
    assert not list(tmp_path.iterdir())


@WRITERS
def test_the_draft_of_a_process_that_was_killed_is_taken_over(tmp_path, writer):
    draft = tmp_path / "out" / ".draft" if writer is complete_files else tmp_path / ".out.draft"
    (draft / "deep").mkdir(parents=True)
    (draft / "left").write_text("of a killed process")
    with writer(tmp_path / "out") as draft:
        assert not list(draft.iterdir())
        (draft / "a").write_text("1")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


def test_files_replace_each_other_at_once_and_what_else_is_there_stays(tmp_path):
    out = tmp_path / "out"
    (out / "chat").mkdir(parents=True)
    for name in ("a", "b"):
        (out / name).write_text("old")
    with contextlib.suppress(KeyboardInterrupt), complete_files(out) as draft:
        (draft / "a").write_text("new")
        raise KeyboardInterrupt
    assert {p.name for p in out.iterdir()} == {"chat", "a", "b"}
    with complete_files(out) as draft:
        for name in ("a", "b"):
            (draft / name).write_text("new")
        assert (out / "a").read_text() == "old"
    assert {(out / name).read_text() for name in ("a", "b")} == {"new"}
    assert {p.name for p in out.iterdir()} == {"chat", "a", "b"}


def test_a_swap_that_a_kill_interrupted_is_finished_by_the_next_reader(tmp_path, monkeypatch):
    replace, moved = os.replace, []

    def killed(source, target):
        if moved:
            raise SystemExit("killed")
        moved.append(target)
        replace(source, target)

    (tmp_path / "a").write_text("old")
    (tmp_path / "b").write_text("old")
    monkeypatch.setattr(os, "replace", killed)
    with contextlib.suppress(SystemExit), complete_files(tmp_path) as draft:
        for name in ("a", "b"):
            (draft / name).write_text("new")
    monkeypatch.undo()
    assert {(tmp_path / name).read_text() for name in ("a", "b")} == {"old", "new"}
    finish_swap(tmp_path)
    assert {(tmp_path / name).read_text() for name in ("a", "b")} == {"new"}
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    finish_swap(tmp_path)  # once more changes nothing


def planted(folder):
    """A folder of somebody else that links lead to."""
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "kept.txt").write_text("kept")
    return folder / "elsewhere"


@pytest.mark.parametrize("name", [".out.draft", ".out.old"])
def test_a_link_in_place_of_a_draft_beside_the_folder_is_not_followed(tmp_path, name):
    elsewhere = planted(tmp_path)
    (tmp_path / name).symlink_to(elsewhere)
    with complete_folder(tmp_path / "out") as draft:
        (draft / "new.txt").write_text("new")
    with complete_folder(tmp_path / "out") as draft:
        (draft / "new.txt").write_text("newer")
    assert [path.name for path in elsewhere.iterdir()] == ["kept.txt"]
    assert (tmp_path / "out" / "new.txt").read_text() == "newer"
    assert not (tmp_path / "out").is_symlink()


def test_links_in_place_of_drafts_inside_the_folder_are_not_followed(tmp_path):
    elsewhere = planted(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / ".complete").symlink_to(elsewhere)
    finish_swap(out)
    assert (elsewhere / "kept.txt").exists()
    (out / ".complete").unlink()
    (out / ".draft").symlink_to(elsewhere)
    with complete_files(out) as draft:
        (draft / "new.txt").write_text("new")
    assert (elsewhere / "kept.txt").exists()
    assert [path.name for path in out.iterdir()] == ["new.txt"]


def test_a_link_in_a_draft_that_was_left_is_removed_alone(tmp_path):
    elsewhere = planted(tmp_path)
    (tmp_path / ".out.draft").mkdir()
    (tmp_path / ".out.draft" / "link").symlink_to(elsewhere)
    with complete_folder(tmp_path / "out") as draft:
        assert list(draft.iterdir()) == []
    assert (elsewhere / "kept.txt").exists()


def test_a_link_in_place_of_the_draft_of_a_file_is_not_written_through(tmp_path):
    kept = planted(tmp_path) / "kept.txt"
    (tmp_path / ".record.json.draft").symlink_to(kept)
    write_json(tmp_path / "record.json", {"a": 1})
    assert kept.read_text() == "kept"
    assert json.loads((tmp_path / "record.json").read_text()) == {"a": 1}


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o600])
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path, mode):
    before = os.umask(0o077)
    try:
        write_json(tmp_path / "new.json", {})
        (tmp_path / "old.json").write_text("{}")
        (tmp_path / "old.json").chmod(mode)
        write_json(tmp_path / "old.json", {"a": 1})
        with complete_files(tmp_path) as draft:
            (draft / "old.json").write_text("[]")
    finally:
        os.umask(before)
    assert (tmp_path / "old.json").read_text() == "[]"
    assert stat.S_IMODE((tmp_path / "old.json").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "new.json").stat().st_mode) == 0o600


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_link_in_place_of_a_file_is_replaced_and_not_written_through(tmp_path, link):
    (tmp_path / "precious").write_text("years")
    (tmp_path / "precious").chmod(0o604)
    link(tmp_path / "precious", tmp_path / "out")
    with replaced_bytes(tmp_path / "out") as file:
        file.write(b"\xff")
    assert (tmp_path / "out").read_bytes() == b"\xff"
    assert (tmp_path / "precious").read_text() == "years"
    assert ((tmp_path / "out").stat().st_mode & 0o777 == 0o604) == (link is os.link)


def test_text_that_cannot_be_written_leaves_the_old_file_and_no_draft(tmp_path):
    (tmp_path / "out").write_text("old")
    with pytest.raises(UnicodeEncodeError), replaced_file(tmp_path / "out") as file:
        file.write("\ud801")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").read_text() == "old"


@pytest.mark.parametrize("name", ["out", ".out.draft", ".out.old"])
def test_a_folder_in_place_of_a_file_and_the_reverse_are_found_before_the_work(tmp_path, name):
    for kind in ("file", "folder"):
        check_place(tmp_path / "out", kind)
    (tmp_path / name).write_text("x")
    check_place(tmp_path / "out", "file")
    with pytest.raises(RunError, match=f"a folder at .*{name}, there is a file"):
        check_place(tmp_path / "out", "folder")
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    check_place(tmp_path / "out", "folder")
    if name == ".out.old":  # which a file never has
        check_place(tmp_path / "out", "file")
        return
    with pytest.raises(RunError, match=f"a file at .*{name}, there is a folder"):
        check_place(tmp_path / "out", "file")


@pytest.mark.parametrize("name", [".out.draft", ".out.old", "out/.draft", "out/.complete"])
def test_a_file_in_place_of_a_draft_is_found_before_the_work(tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / name).mkdir()
    check_folder_for_output(tmp_path / "out", allow_content=True)
    check_folder_for_output(Path("/"), allow_content=True)
    (tmp_path / name).rmdir()
    (tmp_path / name).write_text("x")
    with pytest.raises(RunError, match=f"a folder at .*{name}, there is a file"):
        check_folder_for_output(tmp_path / "out", allow_content=True)


def test_a_link_to_nothing_is_no_folder_for_output(tmp_path):
    (tmp_path / "out").symlink_to("nowhere")
    for folder in (tmp_path / "out", tmp_path / "out" / "inner"):
        with pytest.raises(RunError, match="out is a link to nothing"):
            check_folder_for_output(folder)
    (tmp_path / "nowhere").mkdir()
    check_folder_for_output(tmp_path / "out")
