"""Provenance of a result: versions, hardware and hashes, with secrets masked.

Secrets are masked at any depth; paths below the user's home are written with `~`; host names are
never read.
"""

import contextlib
import datetime
import hashlib
import json
import os
import platform
import re
import resource
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import medft
from medft.files import cache_folder, file_sha256, write_json
from medft.masking import MASK, NAMES_SECRET, masked_text

PACKAGES = [
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "trl",
    "accelerate",
    "datasets",
    "pillow",
    "deepspeed",
    "safetensors",
    "tokenizers",
    "numpy",
]

_BEFORE_PATH = r"""(?:(?<=[\s='":;,(\[{<>|`])|(?<=://))"""
"""What a path follows inside a sentence or a word of a command line."""

_AFTER_HOME = r"""(?=/|$|[\s'":;,)\]}<>|`]|\.(?:\s|$))"""
"""What ends the home folder's name there: a name that goes on is another folder's."""

_COARSEST_TIME = 2.0
"""Seconds between two modification times of a file system that rounds them, as FAT does."""


def masked(content: Any, *, secret: bool = False) -> Any:
    """A copy with secrets masked, and home as `~`.

    A string is `***` below a key that names a secret; in others, what looks like one is. Home is
    replaced where a path begins, never inside one: `/data/home/ada` is not below `/home/ada`.

    Args:
        content: a JSON-serializable value.
        secret: whether a key above names a secret.
    """
    return _masked(content, _homes(), secret=secret)


def _masked(content: Any, homes: list[str], *, secret: bool) -> Any:
    if isinstance(content, dict):
        return {
            key: _masked(value, homes, secret=secret or bool(NAMES_SECRET.search(str(key))))
            for key, value in content.items()
        }
    if isinstance(content, list | tuple):
        return [_masked(value, homes, secret=secret) for value in content]
    if not isinstance(content, str):
        return content
    return MASK if secret else _without_home(masked_text(content), homes)


def _homes() -> list[str]:
    """The home folder as it is named and, where that is a link, as it is; none if it is unknown."""
    try:
        home = Path.home()
    except RuntimeError:  # no HOME, and nobody of this user's number
        return []
    names = {str(home), os.path.realpath(home)}
    return sorted((n for n in names if n.startswith("/") and n.strip("/")), key=len, reverse=True)


def _without_home(text: str, homes: list[str]) -> str:
    """The text with home as `~`: where it is an absolute path at its start, else at each path's."""
    for home in homes:
        if not text.startswith("/"):
            text = re.sub(rf"{_BEFORE_PATH}{re.escape(home)}{_AFTER_HOME}", "~", text)
        elif text == home or text.startswith(f"{home}/"):
            return f"~{text[len(home) :]}"
    return text


def masked_words(words: list[str]) -> list[str]:
    """The words of a command line; an override that names a secret shows its key only."""
    return [_masked_word(word) for word in words]


def _masked_word(word: str) -> str:
    key, equals, value = word.partition("=")
    named = [key, *re.findall(r"([\w-]+)['\"]?\s*:", value)]  # keys inside the value, too
    if equals and any(map(NAMES_SECRET.search, named)):
        return f"{key}={MASK}"
    return masked(word)


def folder_sha256(folder: Path, *, hash_of: Callable[[Path], str] = file_sha256) -> str:
    """One hash over the names and contents of all files of a folder.

    Args:
        folder: searched at any depth.
        hash_of: hashes a file's content.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{hash_of(path)}\n".encode())
    return digest.hexdigest()


def remembered_sha256(path: Path) -> str:
    """SHA-256 of a file, computed once for its path, size and modification time.

    The hash is kept in the folder hashes of `cache_folder`; where that cannot be written, and for a
    file so new that its time might not show the next change, it is computed each time.
    """
    state = path.stat()
    place = str(path.absolute())
    known = {"path": place, "size": state.st_size, "mtime_ns": state.st_mtime_ns}
    name = hashlib.sha256(place.encode()).hexdigest()[:32]
    memory = cache_folder() / "hashes" / f"{name}.json"
    try:
        content = json.loads(memory.read_text(encoding="utf-8"))
        if {key: content[key] for key in known} == known:
            return content["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not hashed yet, or damaged
    digest = file_sha256(path)
    if time.time() - state.st_mtime < _COARSEST_TIME:
        return digest
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_json(memory, {**known, "sha256": digest})
    return digest


def peak_memory() -> dict[str, int]:
    """Peak memory of this process in bytes: host and, with CUDA, device (allocated, reserved)."""
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        peak["device"] = torch.cuda.max_memory_allocated()
        peak["device_reserved"] = torch.cuda.max_memory_reserved()
    return peak


def now() -> str:
    """The current UTC time in ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def package_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that a result may depend on."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def hardware() -> dict[str, Any]:
    """Architecture, system, processors and the versions that drive them, not the machine's name."""
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu_count": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def medft_version() -> dict[str, Any]:
    """The version of medft and, in a checkout, its commit and whether the tree is dirty."""
    checkout = Path(medft.__file__).parent.parent
    version: dict[str, Any] = {"version": medft.__version__, "commit": None, "dirty": None}
    if (checkout / ".git").exists():
        version["commit"] = _git(checkout, "rev-parse", "HEAD") or None
        version["dirty"] = bool(_git(checkout, "status", "--porcelain"))
    return version


def _git(checkout: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(checkout), *words], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""
