"""The parts of a run: each start with its versions, machine and command line, kept in run.json."""

import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from medft.compat import untested_versions
from medft.config.recipe import Recipe
from medft.models.run_record import PART_KEYS, leaves, parts_of
from medft.models.saved import RunLayout
from medft.provenance import (
    hardware,
    masked,
    masked_words,
    medft_version,
    now,
    package_versions,
)
from medft.training.checkpoints import step_of
from medft.training.process import THREADS

logger = logging.getLogger(__name__)


def first_entries(recipe: Recipe, argv: list[str], launch: dict[str, Any]) -> dict[str, Any]:
    """The entries of run.json that say what is started where; warns of untested versions.

    Args:
        recipe: as resolved now.
        argv: the command line.
        launch: how this process was launched.
    """
    if untested := untested_versions():
        named = ", ".join(f"{name} {version}" for name, version in untested.items())
        logger.warning("not among the versions that medft was tested with: %s", named)
    started = now()
    return {
        "status": "running",
        "medft": medft_version(),
        "argv": masked_words(argv),
        "started": started,
        "started_in": str(Path.cwd()),
        "recipe": recipe.model_dump(),
        "seed": recipe.train.seed,
        "packages": package_versions(),
        "untested_packages": untested,
        "hardware": hardware(),
        "launch": launch,
        "parts": [{"started": started, "from_step": 0}],
    }


def go_on(layout: RunLayout, entries: dict[str, Any], checkpoint: Path | None) -> None:
    """Put the parts of an earlier record before the one that begins; warns of another machine.

    Args:
        layout: of the run, which may have no record yet.
        entries: of `first_entries`, changed in place.
        checkpoint: to continue from; None for a fresh start after parts that never saved.
    """
    if not layout.record.is_file():
        return
    earlier = layout.read_record()
    [part] = entries["parts"]
    part["from_step"] = step_of(checkpoint) if checkpoint else 0
    part["changed"] = _changes(earlier["recipe"], masked(entries["recipe"]))
    entries["parts"] = [*parts_of(earlier), part]
    entries["started"] = earlier["started"]
    if checkpoint:
        if "init_from" in earlier:
            entries["init_from"] = earlier["init_from"]
        _compare(earlier, entries)


class SavedStepCallback(TrainerCallback):
    """Records after which step a checkpoint was complete, once it is."""

    def __init__(self, record: Callable[[int], None]) -> None:
        self._record = record

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the step; it must stand after what completes the checkpoint."""
        self._record(state.global_step)


def update_part(record: dict[str, Any]) -> None:
    """Copy the entries of a run.json that concern its newest part into it."""
    record["parts"][-1] |= {key: record[key] for key in PART_KEYS if key in record}


def _changes(then: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """Recipe keys that changed, with both values."""
    first, second = dict(leaves(then)), dict(leaves(now))
    return {
        key: [first.get(key), second.get(key)]
        for key in {**first, **second}
        if first.get(key) != second.get(key) and key != "train.resume_from_checkpoint"
    }


def _compare(earlier: dict[str, Any], entries: dict[str, Any]) -> None:
    """Warn where a run goes on with something that may change the last bits of its result."""
    then, now = machine_of(earlier), machine_of(masked(entries))
    if differences := machine_changes(then, now):
        restored = ""
        if None not in (then["threads"], now["threads"]) and then["threads"] != now["threads"]:
            restored = f"; {THREADS}={then['threads']} restores the threads"
        logger.warning(
            "the run goes on otherwise than it began, so that numbers may differ in their last "
            "bits from those of an undisturbed run: %s%s",
            ", ".join(differences),
            restored,
        )


def machine_of(record: dict[str, Any]) -> dict[str, Any]:
    """What may change the last bits of a result, of a run.json or one of its parts."""
    launch = record.get("launch") or {}
    known = {key: record.get(key) for key in ("medft", "packages", "hardware")}
    return known | {"threads": launch.get("threads")}


def machine_now(threads: int) -> dict[str, Any]:
    """The same of this process.

    Args:
        threads: of torch, which another process may be given.
    """
    return masked(
        {
            "medft": medft_version(),
            "packages": package_versions(),
            "hardware": hardware(),
            "threads": threads,
        }
    )


def machine_changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Sentences on what differs between two of `machine_of`; what one lacks is not compared."""
    known = [key for key in then if then[key] is not None and now[key] is not None]
    first, second = (dict(leaves({key: of[key] for key in known})) for of in (then, now))
    sentences = [
        f"{name} was {first.get(name)} and is {second.get(name)}"
        for name in {**first, **second}
        if first.get(name) != second.get(name) and name != "hardware.cpu_count"
    ]
    if first.get("medft.dirty") and second.get("medft.dirty"):
        sentences.append("medft had and has uncommitted changes, which are not compared")
    return sentences


def changes_between_parts(record: dict[str, Any]) -> list[str]:
    """Sentences on what changed of the machine from one part of a run to the next."""
    parts = parts_of(record)
    return [
        f"from step {part['from_step']} on, {sentence}"
        for before, part in pairwise(parts)
        if part["from_step"]
        for sentence in machine_changes(machine_of(before), machine_of(part))
    ]
