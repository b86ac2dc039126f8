"""Checks before a run starts in its folder or resumes from a checkpoint."""

import math
import re
from pathlib import Path
from typing import Any, Protocol

from transformers import EarlyStoppingCallback

from medft.config.recipe import Recipe
from medft.config.train_keys import TrainSection
from medft.errors import RunError
from medft.files import check_folder_for_output, check_place
from medft.models.adapter import check_initial
from medft.models.base import identify_base
from medft.models.resolved import OPTION, Recorded
from medft.models.saved import RunLayout, SavedModel
from medft.provenance import masked
from medft.training.checkpoints import (
    checkpoint_to_resume,
    checkpoints_of,
    state_of,
    step_of,
    world_size_of,
)

FREE_ON_RESUME = re.compile(
    r"train\.(resume_from_checkpoint|output_dir|report_to|run_name|disable_tqdm|logging_.*|save_.*)"
    r"|model\.vision_cache(_gb)?|data\.allow_overlap"
)
"""Recipe keys that may differ on resume, since they do not change what is trained."""


def check_output_dir(train: TrainSection) -> Path | None:
    """The checkpoint to resume from, or None for a fresh start into an empty folder.

    Args:
        train: the recipe's section.

    Raises:
        RunError: the folder is not empty and the run does not resume, or holds no complete
            checkpoint to resume from, or what medft never writes into a run.
    """
    output_dir, resume = Path(train.output_dir), train.resume_from_checkpoint
    check_folder_for_output(output_dir, allow_content=True)
    if not resume and output_dir.exists() and any(output_dir.iterdir()):
        raise RunError(
            f"expected train.output_dir to be empty, {output_dir} is not: choose another "
            f"folder, or resume with train.resume_from_checkpoint=true"
        )
    if resume:
        _check_entries(output_dir)
    checkpoint = checkpoint_to_resume(output_dir, resume)
    if checkpoint and checkpoint.absolute().parent != output_dir.absolute():
        raise RunError(
            f"expected train.resume_from_checkpoint to lie in train.output_dir {output_dir}, got "
            f"{checkpoint}: a run goes on in its own folder"
        )
    if checkpoint:
        _check_later_checkpoints(checkpoint)
    return checkpoint


def _check_entries(run: Path) -> None:
    """Refuse a run directory through which a resumed run would write elsewhere, or wait forever.

    Raises:
        RunError: a link in it leaves it, an entry is a pipe, a device or a link to nothing, or a
            folder is in the place of a file or the reverse.
    """
    root, checkpoints = run.resolve(), checkpoints_of(run)
    for path in run.rglob("*"):
        if not (path.is_file() or path.is_dir()):
            problem = "a pipe, a device or a link to nothing"
        elif not path.resolve().is_relative_to(root):
            problem = "a link that leaves it"
        elif path.is_symlink() and path in checkpoints:
            problem = "a link"
        else:
            continue
        raise RunError(
            f"expected files and folders of its own in the run {run}, {path.relative_to(run)} is "
            f"{problem}: remove it, or start a new run in another folder"
        )
    layout = RunLayout(run)
    for file in (layout.record, layout.recipe, layout.history, layout.curves):
        check_place(file, "file")
    for folder in (layout.adapter, layout.model, layout.best_model, run / "runs", *checkpoints):
        check_place(folder, "folder")


def _check_later_checkpoints(resumed: Path) -> None:
    """Refuse later checkpoints whose files cannot be written again, as a resumed run does.

    Raises:
        RunError: one holds a file that has another name elsewhere, or a folder.
    """
    for checkpoint in checkpoints_of(resumed.absolute().parent):
        if step_of(checkpoint) <= step_of(resumed.absolute()):
            continue
        for path in checkpoint.rglob("*"):
            is_linked = path.is_file() and path.stat().st_nlink > 1
            if is_linked or (path.is_dir() and not path.name.startswith("global_step")):
                problem = "has another name elsewhere (a hard link)" if is_linked else "is a folder"
                raise RunError(
                    f"expected files of its own in {checkpoint}, which the run from {resumed.name} "
                    f"writes again, {path.name} {problem}: move {checkpoint.name} elsewhere"
                )


class PreparedData(Protocol):
    """What a run can know before weights are loaded, as both kinds of trainers prepare it."""

    @property
    def initial(self) -> SavedModel | None:
        """The adapter of `lora.init_from`."""
        ...

    @property
    def record(self) -> dict[str, Any]:
        """Fingerprints and counts of the data, for run.json."""
        ...

    @property
    def batches_per_epoch(self) -> int:
        """Training batches of each process in an epoch."""
        ...

    @property
    def batch_record(self) -> dict[str, Any]:
        """What is known of batches beyond their arithmetic, for run.json."""
        ...


def identify_run(
    recipe: Recipe,
    prepared: PreparedData,
    checkpoint: Path | None,
    *,
    world_size: int | None,
) -> dict[str, Any]:
    """The entries of run.json that say what a run starts from: base, data, init_from.

    Args:
        recipe: as resolved now.
        prepared: the data, and the adapter of `lora.init_from`.
        checkpoint: to continue from; None for a new run.
        world_size: number of processes; None if not known yet.

    Raises:
        RunError: the run cannot continue from the checkpoint.
        BaseModelError: the adapter of `lora.init_from` was trained on another base.
    """
    base = identify_base(recipe.model)
    if checkpoint:
        check_same_run(recipe, base, prepared.record, checkpoint, world_size)
    starts_from = check_initial(prepared.initial, base) if prepared.initial else {}
    return {"base": base, "data": prepared.record, **starts_from}


def check_same_run(
    recipe: Recipe,
    base: dict[str, Any],
    data: dict[str, Any],
    checkpoint: Path,
    world_size: int | None,
) -> None:
    """Refuse to resume a run if anything that decides what is trained has changed.

    Args:
        recipe: as resolved now.
        base: what identifies the base now.
        data: the record of the prepared data, as read now.
        checkpoint: the one to continue from, in the run's directory.
        world_size: number of processes now; None if not known yet.

    Raises:
        RunError: a recipe key, the base, the data, the plan of the checkpoint's state or the number
            of processes differs, or the run is already finished.
    """
    run = checkpoint.parent
    earlier = RunLayout(run).read_record()
    if changed := _changed_keys(recipe, earlier["recipe"]):
        raise RunError(
            f"expected the recipe of the interrupted run in {run}, these keys differ: {changed}: "
            f"restore them, or start a new run in another folder"
        )
    for name, content in (("base", base), ("data", data)):
        if masked(content) != earlier[name]:
            raise RunError(
                f"expected the {name} of the interrupted run in {run}, its files have changed: "
                f"restore them, or start a new run in another folder"
            )
    check_state(recipe.train, checkpoint, steps=earlier["batch"]["steps"])
    results = RunLayout(run).results
    if results and state_of(checkpoint).global_step >= earlier.get("steps_done", math.inf):
        raise RunError(
            f"expected an unfinished run to resume in {run}, {checkpoint.name} is its last step: "
            f"take {results[0]}"
        )
    if world_size is not None and world_size_of(checkpoint) != world_size:
        raise RunError(
            f"expected {world_size_of(checkpoint)} processes as in the interrupted run in {run}, "
            f"got {world_size}: the order of the rows would change"
        )


def check_as_recorded(recipe: Recipe, recorded: Recorded) -> None:
    """Refuse to repeat a record with another recipe, whose keys the record would override.

    Args:
        recipe: as resolved now.
        recorded: the record.

    Raises:
        RunError: a key that decides what is trained differs.
    """
    if changed := _changed_keys(recipe, recorded.recipe):
        raise RunError(
            f"expected the recipe of the run recorded in {recorded.path}, these keys differ: "
            f"{changed}: restore them, or start a new run without {OPTION}"
        )


def _changed_keys(recipe: Recipe, recorded: dict[str, Any]) -> str:
    """Keys that decide what is trained and differ from a record, as text with both values."""
    current, then = _flat(masked(recipe.model_dump())), _flat(recorded)
    return ", ".join(
        f"{key} ({then.get(key)} -> {current.get(key)})"
        for key in sorted(current.keys() | then.keys())
        if current.get(key) != then.get(key) and not FREE_ON_RESUME.fullmatch(key)
    )


def check_state(train: TrainSection, checkpoint: Path, *, steps: int) -> None:
    """Refuse a checkpoint whose state is of another plan: Trainer would follow it, not the recipe.

    Args:
        train: the recipe's section.
        checkpoint: the one to continue from.
        steps: number of optimizer steps of the whole run.

    Raises:
        RunError: its number of steps differs, it is past them, or it stops early by other rules.
    """
    state = state_of(checkpoint)
    stopping = train.early_stopping()
    expected = EarlyStoppingCallback(**stopping).state()["args"] if stopping else None
    found = (state.stateful_callbacks.get("EarlyStoppingCallback") or {}).get("args")
    if state.max_steps != steps or state.global_step > steps:
        problem = f"has step {state.global_step} of {state.max_steps}, not of {steps}"
    elif found != expected:
        problem = f"stops early by {found}, not by {expected}"
    else:
        return
    raise RunError(
        f"expected the state of this run in {checkpoint}, its trainer_state.json {problem}: "
        f"resume another checkpoint"
    )


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        return {prefix: content}
    return {
        name: value
        for key, inner in content.items()
        for name, value in _flat(inner, f"{prefix}.{key}" if prefix else str(key)).items()
    }
