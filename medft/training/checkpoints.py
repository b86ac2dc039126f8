"""Manifests that separate complete checkpoints from corrupt ones.

A checkpoint is complete once it holds its manifest: the size and hash of every saved file, and the
number of processes that saved them. The manifest is written last, so that a killed save, a full
disk, and a file that was lost or truncated afterwards are all detected.
"""

import logging
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from transformers import TrainerState

from medft.compat import names_in_pickle
from medft.config.strict_yaml import PathText
from medft.errors import MedftError, RunError
from medft.files import file_sha256, write_json
from medft.foreign import read_json
from medft.models.model_folder import check_model_folder
from medft.models.run_record import reason_of

MANIFEST = "manifest.json"

_NEVER_LOADED = "training_args.bin"
"""A pickle that Trainer writes and does not read; older checkpoints of medft hold it."""

_NAME = re.compile(r"checkpoint-([0-9]+)")

_MOST_STEPS = 10**9
"""Of any recipe."""

logger = logging.getLogger(__name__)


def write_manifest(checkpoint: Path, *, world_size: int, seconds: float = 0) -> None:
    """Write the manifest of a complete checkpoint; call it when every process has saved.

    Args:
        checkpoint: its folder.
        world_size: number of processes that saved it.
        seconds: that saving took until now.
    """
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    entries = {
        path.relative_to(checkpoint).as_posix(): [path.stat().st_size, file_sha256(path)]
        for path in files
        if path.name != MANIFEST
    }
    content = {"world_size": world_size, "seconds": round(seconds, 1), "files": entries}
    write_json(checkpoint / MANIFEST, content)


class _Manifest(BaseModel):
    model_config = ConfigDict(strict=True)

    world_size: int
    seconds: float = Field(0, ge=0, allow_inf_nan=False)
    files: dict[PathText, Annotated[tuple[int, str], Field(strict=False)]]


class _Complete(BaseModel):
    """A part of Trainer's state that holds nothing else."""

    model_config = ConfigDict(strict=True, extra="forbid")


class _Control(_Complete):
    args: dict[
        Literal[
            "should_training_stop",
            "should_epoch_stop",
            "should_save",
            "should_evaluate",
            "should_log",
        ],
        bool,
    ]
    attributes: dict[str, Any] = Field(max_length=0)


class _Patience(_Complete):
    early_stopping_patience: int
    early_stopping_threshold: float


class _Counter(_Complete):
    early_stopping_patience_counter: int = Field(ge=0, le=_MOST_STEPS)


class _EarlyStopping(_Complete):
    args: _Patience
    attributes: _Counter


class _Callbacks(_Complete):
    """The callbacks that Trainer makes again, with any attribute that stands here."""

    control: _Control = Field(alias="TrainerControl")
    early_stopping: _EarlyStopping | None = Field(None, alias="EarlyStoppingCallback")


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, float]

    step: int = Field(ge=0, le=_MOST_STEPS)


class _State(BaseModel):
    """Trainer's state, as Trainer saves it."""

    model_config = ConfigDict(strict=True, extra="allow")

    epoch: float = Field(ge=0, le=_MOST_STEPS)
    global_step: int = Field(ge=1, le=_MOST_STEPS)
    max_steps: int = Field(ge=1, le=_MOST_STEPS)
    train_batch_size: int
    log_history: list[_Entry]
    best_metric: float | None = Field(None, allow_inf_nan=False)
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    num_input_tokens_seen: int = Field(0, ge=0, lt=2**63)
    total_flos: float = Field(0, ge=0, allow_inf_nan=False)
    logging_steps: float = Field(500, ge=1, le=_MOST_STEPS)
    eval_steps: float = Field(500, ge=1, le=_MOST_STEPS)
    save_steps: float = Field(500, ge=1, le=_MOST_STEPS)
    is_hyper_param_search: Literal[False] = False
    trial_name: None = None
    trial_params: None = None
    stateful_callbacks: _Callbacks


def what_is_missing(checkpoint: Path) -> str | None:
    """The reason why a checkpoint cannot be resumed from, or None if it is complete.

    A file that would run code when it is loaded is such a reason: somebody else may have made the
    checkpoint, manifest included.
    """
    try:
        files = _manifest(checkpoint).files
    except (OSError, ValueError):
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
    if absent:
        return f"it holds no {', no '.join(absent)}"
    return _what_is_foreign(checkpoint)


def _manifest(checkpoint: Path) -> _Manifest:
    """The manifest; raises OSError or ValueError if it cannot be read."""
    return _Manifest.model_validate(read_json(checkpoint / MANIFEST))


def _what_is_foreign(checkpoint: Path) -> str | None:
    """What a complete checkpoint holds that medft never saves; None if nothing."""
    try:
        step = state_of(checkpoint).global_step
        check_model_folder(checkpoint)
    except MedftError as error:
        return error.problems[0]
    if checkpoint.absolute().name != f"checkpoint-{step}":
        return f"its trainer_state.json is of step {step}"
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint).as_posix()
        if path.suffix not in (".pt", ".pth", ".bin") or name == _NEVER_LOADED:
            continue
        try:
            named = names_in_pickle(path)
        except Exception:  # whatever a damaged file makes torch raise
            return f"{name} is no file that torch.save writes"
        if named:
            return f"{name} would run code that it names ({', '.join(named[:3])})"
    tag = checkpoint / "latest"
    if tag.exists() and not re.fullmatch(
        r"global_step\d+", tag.read_text(errors="replace").strip()
    ):
        return "latest, of DeepSpeed, names another folder"
    return None


def state_of(checkpoint: Path) -> TrainerState:
    """The Trainer state saved in a checkpoint.

    Raises:
        RunError: it cannot be read, or has other types.
    """
    path = checkpoint / "trainer_state.json"
    try:
        content = read_json(path, strict=False)  # it may hold NaN
        _State.model_validate(content)
        return TrainerState(**content)
    except (OSError, ValueError, TypeError) as error:
        raise RunError(
            f"expected Trainer's state in {path}, could not read it ({reason_of(error)}): resume "
            f"another checkpoint"
        ) from error


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first."""
    found = [path for path in run.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint folder."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoint_to_resume(run: Path, resume: bool | str | None) -> Path | None:
    """The checkpoint that training continues from; None for a fresh start.

    Args:
        run: the run directory.
        resume: true for the newest complete checkpoint of the run, or the path of one; "auto" for
            the newest if there is one.

    Raises:
        RunError: there is no complete checkpoint, or the given one is not complete.
    """
    if not resume:
        return None
    if isinstance(resume, str) and resume != "auto":
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
    if resume == "auto":
        return None
    raise no_checkpoint(run)


def no_checkpoint(run: Path) -> RunError:
    """The error for a run directory without a complete checkpoint."""
    return RunError(
        f"expected a complete checkpoint in {run} to resume from, found none: "
        f"remove train.resume_from_checkpoint and the folder to start afresh"
    )


def seconds_to_save(checkpoint: Path) -> float:
    """Seconds that it took to save a complete checkpoint; 0 if that was not recorded."""
    return _manifest(checkpoint).seconds


def evaluation_is_missing(checkpoint: Path) -> bool:
    """Whether the run was stopped in the evaluation that was due at a checkpoint's step."""
    control = state_of(checkpoint).stateful_callbacks["TrainerControl"]
    return bool(control["args"].get("should_evaluate"))


def has_ended(checkpoint: Path, *, steps: int) -> bool:
    """Whether nothing is left to be trained after a checkpoint, of a run of so many steps."""
    state = state_of(checkpoint)
    stopping = state.stateful_callbacks.get("EarlyStoppingCallback")
    is_stopped_early = stopping is not None and (
        stopping["attributes"]["early_stopping_patience_counter"]
        >= stopping["args"]["early_stopping_patience"]
    )
    return state.global_step >= steps or is_stopped_early


def world_size_of(checkpoint: Path) -> int:
    """The number of processes that wrote a complete checkpoint."""
    return _manifest(checkpoint).world_size
