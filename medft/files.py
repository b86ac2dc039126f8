"""Files written completely or not at all, file hashes, and files that ship with medft."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import medft
from medft.errors import RecipeError, RunError


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically: the file holds its old content or all of the new."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(draft, path)


def check_folder_for_output(folder: Path, *, allow_content: bool = False) -> None:
    """Raise, before any work is done, if a folder is not writable or not empty.

    Args:
        folder: may not exist yet.
        allow_content: whether existing content may be replaced.

    Raises:
        RunError: it is a file, not writable, or not empty.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise RunError(f"expected a folder for the output, {existing} is a file: choose another")
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
    """A draft folder beside `folder`; it replaces `folder` when the block ends without an error."""
    folder = folder.absolute()
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    yield draft
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


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
