"""Whole and torn checkpoints.

A checkpoint counts as whole once its manifest lies in it: the size and hash of every file that
the save wrote, and the number of processes that wrote them. The manifest comes last, so a save
that was killed, a disk that filled up and a file that was lost or cut afterwards all show.
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from medft.errors import BaseModelError, RunError
from medft.files import file_sha256, write_json

MANIFEST = "manifest.json"

logger = logging.getLogger(__name__)


def write_manifest(checkpoint: Path, *, world_size: int) -> None:
    """Declare a checkpoint whole; call it when every process has written its part."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    entries = {
        path.relative_to(checkpoint).as_posix(): [path.stat().st_size, file_sha256(path)]
        for path in files
        if path.name != MANIFEST
    }
    write_json(checkpoint / MANIFEST, {"world_size": world_size, "files": entries})


def what_is_missing(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, or None where it is whole."""
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
        resume: true for the newest whole checkpoint of the run, or the path of one.

    Raises:
        RunError: no whole checkpoint is there, or the given one is not whole.
    """
    if not resume:
        return None
    if isinstance(resume, str):
        checkpoint = Path(resume)
        missing = what_is_missing(checkpoint)
        if missing:
            raise RunError(
                f"expected a whole checkpoint at {checkpoint}, {missing}: "
                f"write train.resume_from_checkpoint: true for the newest whole one"
            )
        return checkpoint
    for checkpoint in checkpoints_of(run):
        missing = what_is_missing(checkpoint)
        if missing is None:
            return checkpoint
        logger.warning("skipped %s: %s", checkpoint.name, missing)
    raise RunError(
        f"expected a whole checkpoint in {run} to resume from, found none: "
        f"remove train.resume_from_checkpoint and the folder to start afresh"
    )


def world_size_of(checkpoint: Path) -> int:
    """How many processes wrote a whole checkpoint."""
    return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["world_size"]


class CheckpointKeeper(TrainerCallback):
    """Declares each checkpoint whole once every process has saved, then deletes the oldest.

    Trainer deletes old checkpoints before the new one is known to be whole; this one after.
    """

    def __init__(self, save_total_limit: int | None) -> None:
        self.save_total_limit = save_total_limit

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Write the manifest of the checkpoint that was just saved."""
        wait_for_everyone()
        if not args.should_save:
            return
        run = Path(args.output_dir)
        write_manifest(run / f"checkpoint-{state.global_step}", world_size=args.world_size)
        if self.save_total_limit:
            for old in checkpoints_of(run)[self.save_total_limit :]:
                shutil.rmtree(old)


class BestModelKeeper(TrainerCallback):
    """Writes best_model/ at each evaluation that improves the metric, whatever save_steps is."""

    def __init__(self, save: Callable[[Path], None]) -> None:
        self.save = save

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Compare with the best so far, which Trainer updates after this call."""
        name = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
        value, best = metrics[name], state.best_metric
        if best is None or (value > best if args.greater_is_better else value < best):
            try:
                self.save(Path(args.output_dir) / "best_model")
            except BaseModelError as error:  # before the first step that moves anything
                logger.warning("step %s: no best_model/: %s", state.global_step, error)


def wait_for_everyone() -> None:
    """Return when all processes of the run have come here."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()
