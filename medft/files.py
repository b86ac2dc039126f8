"""Files written completely or not at all, file hashes, and files that ship with medft."""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO

import medft
from medft import full_disk
from medft.errors import RecipeError, RunError
from medft.full_disk import is_disk_full

_COMPLETE = ".complete"
"""Folder of files that are complete and not yet moved to their places."""


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically: the file holds its old content or all of the new."""
    with replaced_file(path) as file:
        file.write(json.dumps(content, indent=2, allow_nan=False) + "\n")


@contextmanager
def replaced_file(path: Path) -> Iterator[TextIO]:
    """The same as `replaced_bytes`, for text in UTF-8."""
    with (
        replaced_bytes(path) as file,
        io.TextIOWrapper(file, encoding="utf-8", newline="") as text,
    ):
        yield text


@contextmanager
def replaced_bytes(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` that replaces it, and keeps its mode, when the block ends.

    If the block fails, the old file stays. Neither a symbolic link that somebody put in its place
    nor another name of the old file (a hard link) is written through.

    Raises:
        OSError: it cannot be written; where the disk is full, the error names `path`.
    """
    draft = path.with_name(f".{path.name}.draft")
    draft.unlink(missing_ok=True)
    try:
        with named_if_full(path), draft.open("xb") as file:
            _keep_mode(path, draft)
            yield file
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


@contextmanager
def named_if_full(path: Path) -> Iterator[None]:
    """A block that writes a file, which the error of a full disk names."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error) and error.filename is None:
            error.filename = str(path)
        raise


def _keep_mode(old: Path, new: Path) -> None:
    """Give a new file the mode of the one that it replaces, which its owner may have shared."""
    if old.is_file() and not old.is_symlink():
        shutil.copymode(old, new)


def check_place(path: Path, kind: Literal["file", "folder"]) -> None:
    """Raise, before any work is done, if what is there cannot be replaced by a file or folder.

    Args:
        path: may not exist; the drafts beside it are looked at, too.
        kind: what will be written there.

    Raises:
        RunError: a folder is in the place of a file, or the reverse.
    """
    names = [path.name, f".{path.name}.draft"] + [f".{path.name}.old"] * (kind == "folder")
    for place in (path.parent / name for name in names):
        if place.exists() and place.is_dir() != (kind == "folder"):
            other = "file" if kind == "folder" else "folder"
            raise RunError(
                f"expected to write a {kind} at {place}, there is a {other}: move it elsewhere"
            )


def check_folder_for_output(folder: Path, *, allow_content: bool = False) -> None:
    """Raise, before any work is done, if a folder is not writable or not empty.

    Args:
        folder: may not exist yet.
        allow_content: whether existing content may be replaced.

    Raises:
        RunError: it is a file, not writable, or not empty, or a file is in the place of a draft.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        kind = "a link to nothing" if existing.is_symlink() else "a file"
        raise RunError(f"expected a folder for the output, {existing} is {kind}: choose another")
    for place in (folder.absolute(), folder / ".draft", folder / _COMPLETE):
        check_place(place, "folder")
    if not os.access(existing, os.W_OK):
        raise RunError(
            f"expected a folder to write into, {existing} is not writable: choose another"
        )
    if existing == folder and any(folder.iterdir()) and not allow_content:
        raise RunError(
            f"expected the folder {folder} for the output to be empty, it is not: choose another"
        )


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """A draft folder beside `folder`; it replaces `folder` when the block ends without an error.

    Raises:
        RunError: another process writes the folder, or its disk is full.
    """
    folder = folder.absolute()
    with _draft(folder.with_name(f".{folder.name}.draft"), shown=folder) as draft:
        yield draft
        old = folder.with_name(f".{folder.name}.old")
        if old.is_symlink():
            old.unlink()
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            shutil.copymode(folder, draft)  # its owner may have shared it
            folder.rename(old)
        draft.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def complete_files(folder: Path) -> Iterator[Path]:
    """A draft folder inside `folder`, whose files replace those of `folder` all at once.

    They do so when the block ends without an error; what else lies in `folder` stays. If the
    process is killed while it moves them, `finish_swap` moves the others.

    Raises:
        RunError: another process writes the folder, or its disk is full.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _draft(folder / ".draft", shown=folder) as draft:
            finish_swap(folder)
            yield draft
            draft.rename(folder / _COMPLETE)
            finish_swap(folder)
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty if another process writes it
                folder.rmdir()
        raise


def finish_swap(folder: Path) -> None:
    """Move the files that a killed process had completed in `complete_files` and not yet moved."""
    complete = folder / _COMPLETE
    if complete.is_symlink():  # which medft never makes
        return
    with contextlib.suppress(FileNotFoundError):  # there are none, or another process moved them
        for path in list(complete.iterdir()):
            with contextlib.suppress(FileNotFoundError):
                _keep_mode(folder / path.name, path)
                os.replace(path, folder / path.name)
        complete.rmdir()


@contextmanager
def _draft(draft: Path, *, shown: Path) -> Iterator[Path]:
    """An empty folder that one process has at a time; it is removed if the block fails."""
    if draft.is_symlink():  # which medft never makes: it leads to files of somebody
        draft.unlink()
    draft.mkdir(parents=True, exist_ok=True)
    held = os.open(draft, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if not (_locks(held) and _is_at(held, draft)):
            raise RunError(
                f"expected no other process that writes {shown}, there is one: wait for it, or "
                f"choose another folder"
            )
        try:
            for path in draft.iterdir():  # of a process that was killed
                is_folder = path.is_dir() and not path.is_symlink()
                shutil.rmtree(path) if is_folder else path.unlink()
            yield draft
        except BaseException as error:
            is_full = isinstance(error, Exception) and is_disk_full(error, draft)
            if _is_at(held, draft):
                shutil.rmtree(draft, ignore_errors=True)
            if is_full:
                raise RunError(full_disk.sentence(shown)) from error
            raise
    finally:
        os.close(held)


def _locks(descriptor: int) -> bool:
    """Lock a folder for this process; False if another has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        return error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # it has no locks
    return True


def _is_at(descriptor: int, folder: Path) -> bool:
    """Whether an open folder is still at its path; another process may have moved it."""
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except FileNotFoundError:
        return False


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def packaged_file(name: str) -> Path:
    """Path of a file that ships with medft, such as recipes/decoder_qlora.py; checkout or wheel.

    Raises:
        RecipeError: this installation lacks it.
    """
    package = Path(medft.__file__).parent
    for root in (package.parent, package / "shipped"):
        if (root / name).exists():
            return root / name
    raise RecipeError(f"expected {name} beside the installed medft, it is missing: reinstall medft")


def cache_folder() -> Path:
    """Where medft keeps what it would compute again: `$MEDFT_CACHE`, or `~/.cache/medft`."""
    given = os.environ.get("MEDFT_CACHE")
    standard = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medft"
    return Path(given).expanduser() if given else standard
