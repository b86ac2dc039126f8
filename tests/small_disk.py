"""A small disk of its own for a command: 60 MB, of which some is taken."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

_MOUNTED = """
set -e
folder=$1; kilobytes=$2; again=$3; shift 3
mount -t tmpfs -o size=60m tmpfs $folder
[ -d "$folder.earlier" ] && cp -r "$folder.earlier" $folder/out
set +e
used=$(df -k --output=used $folder | tail -1)
fallocate -l $((60 * 1024 - used - kilobytes))k $folder/filler
"$@" 2> $folder.stderr
echo $? > $folder.code
rm -rf $folder.left $folder.after
cp -r $folder $folder.left
rm -f $folder.left/filler $folder/filler
[ -z "$again" ] && exit
"$@" $again 2> $folder.stderr_again
echo $? > $folder.code_again
cp -r $folder $folder.after
"""
"""Runs a command with a folder on a disk, and once more after there is room."""


@dataclass
class Ended:
    """How a command ended on a disk that filled, and after room was made."""

    code: int
    error: str
    left: Path
    """A copy of the disk."""

    after: Path | None
    """A copy of the disk after the second try."""

    code_after: int | None

    error_after: str

    @property
    def files(self) -> list[str]:
        """The files that were left."""
        return sorted(str(p.relative_to(self.left)) for p in self.left.rglob("*") if p.is_file())


def on_small_disk(folder: Path, kilobytes: int, *command: object, again: str = "") -> Ended:
    """Run a command with a disk at `folder` that has so much room.

    Args:
        folder: where the disk is; `folder.earlier` beside it is its folder `out` before.
        kilobytes: of room.
        *command: of Python.
        again: an argument with which the command runs once more, after room was made.
    """
    folder.mkdir(exist_ok=True)

    def beside(suffix: str) -> Path:
        return folder.with_name(f"{folder.name}.{suffix}")

    words = ["sh", "-c", _MOUNTED, "sh", folder, kilobytes, again, sys.executable, *command]
    done = subprocess.run(
        ["unshare", "-Urm", *map(str, words)], capture_output=True, text=True, check=False
    )
    if not beside("code").exists():
        pytest.skip(f"no disk can be mounted here: {done.stderr}")
    return Ended(
        code=int(beside("code").read_text()),
        error=beside("stderr").read_text(),
        left=beside("left"),
        after=beside("after") if again else None,
        code_after=int(beside("code_again").read_text()) if again else None,
        error_after=beside("stderr_again").read_text() if again else "",
    )


def only_sentence(ended: Ended) -> str:
    """The sentence with which a command ended, which says that the disk is full."""
    assert ended.code == 2, ended.error
    [sentence] = [x for x in ended.error.splitlines() if x.startswith("medft: error: ")]
    assert "its disk is full: make room" in sentence
    for noise in ("Traceback", "No space left", "Exception ignored"):
        assert noise not in ended.error
    return sentence


def kilobytes_in(folder: Path) -> int:
    """What the files of a folder take, in pages of 4 kB."""
    return sum(path.stat().st_size // 4096 + 1 for path in folder.rglob("*") if path.is_file()) * 4
