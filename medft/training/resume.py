"""The folder of a run before it starts: taken by one run at a time, empty, or to go on from."""

import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from medft.config.recipe import DecoderRecipe, Recipe
from medft.config.train_keys import TrainSection
from medft.errors import MedftError, RunError
from medft.files import check_folder_for_output, check_place
from medft.models.run_record import parts_of
from medft.models.saved import RunLayout
from medft.training.checkpoints import (
    MANIFEST,
    checkpoint_to_resume,
    checkpoints_of,
    no_checkpoint,
    step_of,
)
from medft.training.run_lock import LOCK_FILE, RunLock
from medft.training.same_run import is_completed

_NOT_BEGUN = {LOCK_FILE, ".run.json.draft"}
"""What a start may leave that ends before run.json is written."""


@dataclass(frozen=True, slots=True)
class OutputDir:
    """A run directory that this run alone has."""

    checkpoint: Path | None
    """To continue from; None for a fresh start."""

    lock: RunLock
    """Held by the main process; `lock.lost` says whether another run took it meanwhile."""


@contextmanager
def open_output_dir(recipe: Recipe, arguments: TrainingArguments) -> Iterator[OutputDir]:
    """Take the run directory of a recipe for the block, and find where its run goes on.

    The main process does so, the others learn the outcome. If the block writes nothing, folders
    that were made for the lock are removed again.

    Args:
        recipe: as resolved.
        arguments: the trainer's, by which processes were joined.

    Raises:
        RunError: another run has the folder, or it cannot be used, as from `check_output_dir`.
    """
    lock = RunLock(Path(recipe.train.output_dir))
    with closing(lock):
        found: list[Path | MedftError | None] = [None]
        if arguments.process_index == 0:
            try:
                check_outside_base(recipe)
                check_folder_for_output(Path(recipe.train.output_dir), allow_content=True)
                lock.take()
                found = [check_output_dir(recipe.train)]
            except MedftError as error:
                found = [error]
        [outcome] = broadcast_object_list(found)
        if isinstance(outcome, MedftError):
            raise outcome
        yield OutputDir(outcome, lock)


def check_outside_base(recipe: Recipe) -> None:
    """Refuse to write into the folder of a base, whose files identify it.

    Raises:
        RunError: train.output_dir or model.vision_cache is model.base, or lies in it.
    """
    base = Path(recipe.model.base)
    written = {"train.output_dir": recipe.train.output_dir}
    if isinstance(recipe, DecoderRecipe) and recipe.model.vision_cache:
        written["model.vision_cache"] = recipe.model.vision_cache
    for key, folder in written.items():
        if base.is_dir() and Path(folder).resolve().is_relative_to(base.resolve()):
            raise RunError(
                f"expected {key} outside of model.base {base}, which would be another base with "
                f"more files, got {folder}: choose another folder"
            )


def check_output_dir(train: TrainSection) -> Path | None:
    """The checkpoint to resume from; None for a fresh start, or a completed run without any.

    Args:
        train: the recipe's section.

    Raises:
        RunError: the folder is not empty and the run does not resume, or holds no complete
            checkpoint to resume from, or what medft never writes into a run.
    """
    output_dir, resume = Path(train.output_dir), train.resume_from_checkpoint
    check_folder_for_output(output_dir, allow_content=True)
    run = RunLayout(output_dir)
    is_empty = not output_dir.exists() or {p.name for p in output_dir.iterdir()} <= _NOT_BEGUN
    is_foreign = not is_empty and resume == "auto" and not run.record.is_file()
    if is_foreign or (not is_empty and not resume):
        raise RunError(
            f"expected train.output_dir to be empty, {output_dir} is not"
            f"{' and holds no run.json' * is_foreign}: choose another folder"
            f"{', or resume with train.resume_from_checkpoint=true' * (not is_foreign)}"
        )
    if resume:
        _check_entries(output_dir)
    checkpoint = checkpoint_to_resume(output_dir, resume)
    if checkpoint is None:
        if resume == "auto" and not is_empty and _has_saved(run) and not is_completed(run):
            raise no_checkpoint(output_dir)
        return None
    if checkpoint.absolute().parent != output_dir.absolute():
        raise RunError(
            f"expected train.resume_from_checkpoint to lie in train.output_dir {output_dir}, got "
            f"{checkpoint}: a run goes on in its own folder"
        )
    _check_later_checkpoints(checkpoint)
    return checkpoint


def _has_saved(run: RunLayout) -> bool:
    """Whether a run ever had a complete checkpoint, or a result, though it may be gone now.

    Raises:
        RunError: its record cannot be read.
    """
    saved = any((path / MANIFEST).exists() for path in checkpoints_of(run.directory))
    record = run.read_record()
    saved = saved or record["status"] == "completed"
    parts = parts_of(record)
    return saved or any("saved_step" in part or part["from_step"] != 0 for part in parts)


def clear_output_dir(run: RunLayout) -> None:
    """Remove what is left of a run that ended before it had saved, but for its record.

    Args:
        run: its fresh start has passed every check.
    """
    left = [*checkpoints_of(run.directory), *run.results, run.best_model, run.history, run.curves]
    for path in left:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


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
