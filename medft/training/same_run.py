"""What decides what a run trains: identified for run.json, and compared before a run goes on."""

import math
import re
from pathlib import Path
from typing import Any, Protocol

from transformers import EarlyStoppingCallback, TrainingArguments

from medft.config.recipe import Recipe
from medft.config.train_keys import TrainSection
from medft.errors import NothingToDo, RunError
from medft.models.adapter import check_initial
from medft.models.base import identify_base
from medft.models.resolved import OPTION, Recorded
from medft.models.run_record import leaves
from medft.models.saved import RunLayout, SavedModel
from medft.provenance import masked
from medft.training.checkpoints import state_of, world_size_of

_FREE = re.compile(
    r"train\.(resume_from_checkpoint|output_dir|report_to|run_name|disable_tqdm|logging_.*|save_.*)"
    r"|model\.vision_cache(_gb)?|data\.allow_overlap"
)
"""Recipe keys that may differ wherever recipes are compared: they do not change what is trained."""

_FREE_ON_RESUME = re.compile(
    r"train\.(dataloader_(num_workers|prefetch_factor|pin_memory)|torch_empty_cache_steps)"
)
"""The same where a run goes on; a record that is repeated would override them."""

_RECOMPUTED = re.compile(r"train\.gradient_checkpointing(_kwargs(\.use_reentrant)?)?")
"""The same, as long as recomputed layers draw the random numbers of the first time again."""

_EVALUATED = re.compile(r"train\.(eval_.*|per_device_eval_batch_size)")
"""The same, as long as evaluations do not steer the training."""

_COUNTED = re.compile(r"train\.(num_train_epochs|max_steps)")
"""Keys that are compared by the steps that follow from them."""

_STEERED = ("reduce_lr_on_plateau", "greedy")
"""Schedules whose learning rate follows the evaluations."""

_UNSTRETCHED = ("constant", "constant_with_warmup", "inverse_sqrt")
"""Schedules whose learning rate at a step does not depend on the number of steps of the run."""


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
        NothingToDo: the run is completed, and was to be continued only if it was not.
        BaseModelError: the adapter of `lora.init_from` was trained on another base.
    """
    base = identify_base(recipe.model)
    run = RunLayout(Path(recipe.train.output_dir))
    if checkpoint or (recipe.train.resume_from_checkpoint == "auto" and is_completed(run)):
        check_same_run(recipe, base, prepared.record, checkpoint, world_size)
    starts_from = check_initial(prepared.initial, base) if prepared.initial else {}
    return {"base": base, "data": prepared.record, **starts_from}


def is_completed(run: RunLayout) -> bool:
    """Whether a run has its result, and nothing has been trained since it was written.

    Raises:
        RunError: its record cannot be read.
    """
    has_record = run.record.is_file()
    return has_record and run.read_record()["status"] == "completed" and bool(run.results)


def check_same_run(
    recipe: Recipe,
    base: dict[str, Any],
    data: dict[str, Any],
    checkpoint: Path | None,
    world_size: int | None,
) -> None:
    """Refuse to go on with a run if anything that decides what is trained has changed.

    Args:
        recipe: as resolved now; its output_dir holds the run.
        base: what identifies the base now.
        data: the record of the prepared data, as read now.
        checkpoint: the one to continue from; None for a completed run whose checkpoints are gone.
        world_size: number of processes now; None if not known yet.

    Raises:
        RunError: a recipe key, the base, the data, the plan of the checkpoint's state or the number
            of processes differs, or the run is already finished.
        NothingToDo: the same, and it was to be continued only if it was not.
    """
    run = RunLayout(Path(recipe.train.output_dir))
    earlier = run.read_record()
    if changed := _changed_on_resume(recipe, earlier):
        raise RunError(
            f"expected the recipe of the interrupted run in {run.directory}, these keys differ: "
            f"{changed}: restore them, or start a new run in another folder"
        )
    for name, content in (("base", base), ("data", data)):
        if masked(content) != earlier[name]:
            raise RunError(
                f"expected the {name} of the interrupted run in {run.directory}, its files have "
                f"changed: restore them, or start a new run in another folder"
            )
    steps = _check_length(recipe.train, earlier["batch"])
    if is_completed(run) and steps == earlier["batch"]["steps"]:
        _check_unfinished(recipe, run, checkpoint, earlier.get("steps_done", math.inf))
    if checkpoint is None:
        raise RunError(
            f"expected a complete checkpoint in {run.directory} to go on to step {steps}, found "
            f"none: start a new run in another folder"
        )
    check_state(recipe.train, checkpoint, steps=steps)
    if world_size is not None and world_size_of(checkpoint) != world_size:
        raise RunError(
            f"expected {world_size_of(checkpoint)} processes as in the interrupted run in "
            f"{run.directory}, got {world_size}: the order of the rows would change"
        )


def _check_unfinished(
    recipe: Recipe, run: RunLayout, checkpoint: Path | None, steps_done: float
) -> None:
    """Raise if a completed run has no step left to be trained."""
    result = run.results[0]
    if recipe.train.resume_from_checkpoint == "auto":
        raise NothingToDo(f"the run in {run.directory} is completed, its result is {result}")
    if checkpoint and state_of(checkpoint).global_step >= steps_done:
        raise RunError(
            f"expected an unfinished run to resume in {run.directory}, {checkpoint.name} is its "
            f"last step: take {result}"
        )


def check_as_recorded(recipe: Recipe, recorded: Recorded) -> None:
    """Refuse to repeat a record with another recipe, whose keys the record would override.

    Args:
        recipe: as resolved now.
        recorded: the record.

    Raises:
        RunError: a key that decides what is trained differs.
    """
    if changed := _as_text(_changed_keys(recipe, recorded.recipe)):
        raise RunError(
            f"expected the recipe of the run recorded in {recorded.path}, these keys differ: "
            f"{changed}: restore them, or start a new run without {OPTION}"
        )


def _changed_keys(recipe: Recipe, recorded: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys that decide what is trained and differ from a record, with both values."""
    current, then = dict(leaves(masked(recipe.model_dump()))), dict(leaves(recorded))
    return {
        key: (then.get(key), current.get(key))
        for key in sorted(current.keys() | then.keys())
        if current.get(key) != then.get(key) and not _FREE.fullmatch(key)
    }


def _as_text(changed: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key} ({then} -> {now})" for key, (then, now) in changed.items())


def _changed_on_resume(recipe: Recipe, earlier: dict[str, Any]) -> str:
    """Keys that a run may not change as it goes on, as text with both values."""
    has_count = earlier["batch"].get("steps_per_epoch") is not None  # an older medft wrote none
    return _as_text(
        {
            key: both
            for key, both in _changed_keys(recipe, earlier["recipe"]).items()
            if not (is_free_on_resume(key, recipe.train) or (has_count and _COUNTED.fullmatch(key)))
        }
    )


def is_free_on_resume(key: str, train: TrainSection) -> bool:
    """Whether a recipe key may differ where a run with this section goes on, beyond `_FREE`."""
    free = [_FREE_ON_RESUME]
    if (train.gradient_checkpointing_kwargs or {}).get("preserve_rng_state", True):
        free.append(_RECOMPUTED)
    if train.early_stopping_patience is None and train.lr_scheduler_type not in _STEERED:
        free.append(_EVALUATED)
    return any(keys.fullmatch(key) for keys in free)


def _check_length(train: TrainSection, batch: dict[str, Any]) -> int:
    """The number of optimizer steps of the run as it goes on.

    Args:
        train: the recipe's section.
        batch: as run.json has it.

    Raises:
        RunError: what was trained so far would have been trained otherwise with so many.
    """
    planned, per_epoch = batch["steps"], batch.get("steps_per_epoch")
    steps = planned if per_epoch is None else _steps(train, per_epoch)
    if reason := _why_not(train, planned, steps):
        raise RunError(
            f"expected {planned} steps as the run in {train.output_dir} was planned with, got "
            f"{steps}: {reason}: restore train.num_train_epochs and train.max_steps, or start a "
            f"new run in another folder"
        )
    return steps


def _steps(train: TrainSection, per_epoch: int) -> int:
    """Optimizer steps of a run with so many in an epoch, as Trainer counts them."""
    if train.max_steps is not None and train.max_steps > 0:
        return train.max_steps
    epochs = train.num_train_epochs or TrainingArguments.num_train_epochs
    return math.ceil(epochs * per_epoch)


def _why_not(train: TrainSection, planned: int, steps: int) -> str | None:
    """Why a run that was planned with some steps cannot go on to others; None if it can."""
    if steps == planned:
        return None
    if steps < planned:
        return "a run can only become longer"
    if train.lr_scheduler_type not in _UNSTRETCHED:
        return (
            f"{train.lr_scheduler_type} spreads the learning rate over all steps, so that those "
            f"done would have had another one ({', '.join(_UNSTRETCHED)} would not)"
        )
    warm_up = [math.ceil(n * train.warmup_steps) for n in (planned, steps)]
    is_share = train.warmup_steps < 1 and train.lr_scheduler_type != "constant"
    if is_share and warm_up[0] != warm_up[1]:
        return (
            f"train.warmup_steps is a share of the steps, and {warm_up[1]} steps would have "
            f"warmed up instead of {warm_up[0]}"
        )
    if train.early_stopping_patience is not None:
        return "early stopping counts the evaluation at the last step, which would not be the last"
    return None


def check_state(train: TrainSection, checkpoint: Path, *, steps: int) -> None:
    """Refuse a checkpoint whose state is of another plan: Trainer would follow it, not the recipe.

    Args:
        train: the recipe's section.
        checkpoint: the one to continue from.
        steps: number of optimizer steps of the whole run.

    Raises:
        RunError: its number of steps differs, and the run cannot have become longer since; it is
            past them, or it stops early by other rules.
    """
    state = state_of(checkpoint)
    stopping = train.early_stopping()
    expected = EarlyStoppingCallback(**stopping).state()["args"] if stopping else None
    found = (state.stateful_callbacks.get("EarlyStoppingCallback") or {}).get("args")
    if _why_not(train, state.max_steps, steps) or state.global_step > steps:
        problem = f"has step {state.global_step} of {state.max_steps}, not of {steps}"
    elif found != expected:
        problem = f"stops early by {found}, not by {expected}"
    else:
        return
    raise RunError(
        f"expected the state of this run in {checkpoint}, its trainer_state.json {problem}: "
        f"resume another checkpoint"
    )
