"""What becomes of a run whose machine gives out: its disk or its memory."""

import os
import re
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from medft.config.recipe import Recipe
from medft.errors import MedftError, RunError
from medft.files import named_if_full
from medft.full_disk import causes, is_disk_full, named_file
from medft.training.checkpoints import MANIFEST, checkpoints_of, what_is_missing
from medft.training.memory import Change, Where, changes_that_help, memory_that_ran_out
from medft.training.process import another_ended_first
from medft.training.run_lock import RunLock
from medft.training.same_run import is_free_on_resume

_RESERVED_BYTES = 2**16

_OTHER = "expected every process of the run to go on, another one ended before: it says why"

_KILLED = (
    "expected every process of the run to go on, another one was ended, as by the system where "
    "memory runs out: go on with train.resume_from_checkpoint=auto"
)

_PEER_IS_GONE = re.compile("Connection (closed by|reset by) peer|Connection refused|Socket closed")
"""Of a collective operation, in Gloo's words."""

_FUNCTIONS: dict[str, Where] = {
    "evaluation_loop": "evaluation",
    "compute_validation_batch": "evaluation",
    "get_batch_samples": "rows",
    "training_step": "step",
    "train": "step",
}
"""Functions of the trainers by what a training is at inside them, the innermost first."""

_NAMES: dict[Where, str] = {
    "loading": "the loading of the base",
    "step": "a training step",
    "evaluation": "an evaluation",
    "rows": "the rows of a batch",
}


@contextmanager
def named_failures(
    recipe: Recipe, arguments: TrainingArguments, data: dict[str, Any]
) -> Iterator[None]:
    """A block in which a run loads and trains; what the machine lacks is said in one sentence.

    Args:
        recipe: as resolved.
        arguments: the trainer's.
        data: counts of the rows, as in run.json.

    Raises:
        RunError: the disk is full, memory ran out, or another process ended before this one.
    """
    try:
        yield
    except Exception as error:
        problem = _problem(error, recipe, arguments, data)
        if problem is None and not isinstance(error, MedftError):
            problem = _of_another_process(error)
        if problem is None:
            raise
        raise RunError(problem) from error


def _problem(
    error: Exception, recipe: Recipe, arguments: TrainingArguments, data: dict[str, Any]
) -> str | None:
    """The sentence of an error that the machine caused; None for another."""
    run = Path(recipe.train.output_dir)
    if is_disk_full(error, run):
        return _of_disk(error, run)
    if memory := memory_that_ran_out(error):
        where = _where(error)
        changes = changes_that_help(recipe, arguments, data, where)
        listed = (f"{i}. {change.keys} ({change.loss})" for i, change in enumerate(changes, 1))
        return (
            f"expected {memory} to hold {_NAMES[where]}, it ran out: write, in the order of what "
            f"is lost, {', '.join(listed)}{_with_which_it_goes_on(recipe, changes)}"
        )
    return None


def _with_which_it_goes_on(recipe: Recipe, changes: list[Change]) -> str:
    """With which of the changes a run that has saved may go on; the others train something else."""
    checkpoint = _newest_complete(Path(recipe.train.output_dir))
    if checkpoint is None:
        return ""
    may = [
        str(i)
        for i, change in enumerate(changes, 1)
        if all(
            is_free_on_resume(word.partition("=")[0], recipe.train) for word in change.keys.split()
        )
    ]
    resumed = f"the run goes on from {checkpoint.name} with train.resume_from_checkpoint=true and"
    goes_on = f"{resumed} {' or '.join(may)}, " if may else ""
    return f"; {goes_on}with {'another' if may else 'these'} start a new run in another folder"


def _of_another_process(error: Exception) -> str | None:
    """The sentence where another process has ended, which this one then met."""
    if another_ended_first():
        return _OTHER
    is_gone = any(_PEER_IS_GONE.search(str(cause)) for cause in causes(error))
    return _KILLED if is_gone else None


def _where(error: BaseException) -> Where:
    called = [
        frame.name for cause in causes(error) for frame in traceback.extract_tb(cause.__traceback__)
    ]
    return next((where for name, where in _FUNCTIONS.items() if name in called), "loading")


def _of_disk(error: BaseException, run: Path) -> str:
    file = named_file(error)
    of_run = file is None or Path(file).absolute().is_relative_to(run.absolute())
    return (
        f"expected room to write {run if of_run else file}, its disk is full: make room; "
        f"{_how_to_go_on(run)}"
    )


def _how_to_go_on(run: Path) -> str:
    if checkpoint := _newest_complete(run):
        return (
            f"{checkpoint.name} is complete and the run goes on from it with "
            f"train.resume_from_checkpoint=true"
        )
    return f"no checkpoint is complete, remove {run} and start again"


def _newest_complete(run: Path) -> Path | None:
    found = (path for path in checkpoints_of(run) if what_is_missing(path) is None)
    return next(found, None)


@contextmanager
def cleared(run: Path, lock: RunLock) -> Iterator[None]:
    """A block in which a run is written; drafts and checkpoints without manifest go when it ends.

    With them goes a file that takes some room, so that a full disk has room for the run's record.
    The process that writes calls this, and no other; where it has lost the lock, nothing goes.
    """
    reserve = run / ".reserve.draft"
    try:
        with named_if_full(reserve):
            reserve.write_bytes(os.urandom(_RESERVED_BYTES))
        yield
    finally:
        if not lock.lost:
            _clear(run)


def _clear(run: Path) -> None:
    for checkpoint in checkpoints_of(run):
        if not (checkpoint / MANIFEST).exists():
            shutil.rmtree(checkpoint, ignore_errors=True)
    for draft in run.glob(".*.draft"):
        with suppress(OSError):  # the disk gave out: the run's own error says more
            shutil.rmtree(draft) if draft.is_dir() else draft.unlink()
