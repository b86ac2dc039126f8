"""Manifests that separate complete checkpoints from corrupt ones.

A checkpoint is complete once it holds its manifest: the size and hash of every saved file, and the
number of processes that saved them. The manifest is written last, so that a killed save, a full
disk, and a file that was lost or truncated afterwards are all detected.
"""

import json
import logging
from pathlib import Path

from medft.errors import RunError
from medft.files import file_sha256, write_json

MANIFEST = "manifest.json"

logger = logging.getLogger(__name__)


def write_manifest(checkpoint: Path, *, world_size: int) -> None:
    """Write the manifest of a complete checkpoint; call it when every process has saved."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    entries = {
        path.relative_to(checkpoint).as_posix(): [path.stat().st_size, file_sha256(path)]
        for path in files
        if path.name != MANIFEST
    }
    write_json(checkpoint / MANIFEST, {"world_size": world_size, "files": entries})


def what_is_missing(checkpoint: Path) -> str | None:
    """The reason why a checkpoint cannot be resumed from, or None if it is complete."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return f"it has no readable {MANIFEST}, so its save did not end"
    for name, (size, digest) in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or file_sha256(path) != digest:
            return f"{name} is not what was saved"
    has_engine = any(name.startswith("global_step") for name in files)
    required = {
        "trainer_state.json": "trainer_state.json" in files,
        "optimizer state": "optimizer.pt" in files or has_engine,
        "scheduler state": "scheduler.pt" in files or has_engine,
        "RNG state": any(name.startswith("rng_state") for name in files),
    }
    absent = [name for name, there in required.items() if not there]
    return f"it holds no {', no '.join(absent)}" if absent else None


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first."""
    found = [path for path in run.glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[11:]), reverse=True)


def checkpoint_to_resume(run: Path, resume: bool | str | None) -> Path | None:
    """The checkpoint that training continues from; None for a fresh start.

    Args:
        run: the run directory.
        resume: true for the newest complete checkpoint of the run, or the path of one.

    Raises:
        RunError: there is no complete checkpoint, or the given one is not complete.
    """
    if not resume:
        return None
    if isinstance(resume, str):
        checkpoint = Path(resume)
        missing = what_is_missing(checkpoint)
        if missing:
            raise RunError(
                f"expected a complete checkpoint at {checkpoint}, {missing}: "
                f"write train.resume_from_checkpoint: true for the newest complete one"
            )
        return checkpoint
    for checkpoint in checkpoints_of(run):
        missing = what_is_missing(checkpoint)
        if missing is None:
            return checkpoint
        logger.warning("skipped %s: %s", checkpoint.name, missing)
    raise RunError(
        f"expected a complete checkpoint in {run} to resume from, found none: "
        f"remove train.resume_from_checkpoint and the folder to start afresh"
    )


def world_size_of(checkpoint: Path) -> int:
    """The number of processes that wrote a complete checkpoint."""
    return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["world_size"]
