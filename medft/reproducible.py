"""What must hold before a run is repeated, and what differs between then and now.

A run, data or a base that cannot be compared is an error of one sentence; nothing is written here.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from medft.check import Checked, check
from medft.config.recipe import DecoderRecipe, Recipe, SiglipRecipe
from medft.data.rows import image_source
from medft.errors import RunError
from medft.files import check_folder_for_output, file_sha256
from medft.foreign import at_home
from medft.masking import MASK, printable
from medft.models.base import identify_base
from medft.models.resolved import Recorded, read_recorded
from medft.models.run_record import RecordedLaunch, leaves
from medft.models.saved import RunLayout
from medft.provenance import masked
from medft.since_then import default_changes, first_change
from medft.training.parts import changes_between_parts, machine_changes, machine_now, machine_of
from medft.training.process import THREADS, num_threads
from medft.training.same_run import check_as_recorded, identify_run

_SHA256 = re.compile("[0-9a-f]{64}")

Verdict = Literal["bitwise possible", "numerically close"]
"""What can be expected of a run that is repeated here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A run that can be repeated here: every check has passed, nothing is written yet."""

    run: RunLayout
    out: Path
    recipe: Recipe
    launch: RecordedLaunch
    recorded: Recorded
    threads: int
    """Of torch, in each process."""

    on_cpu: bool
    differs_now: list[str]
    """Sentences on what is not as it was when the run was recorded."""

    applied: list[str]
    """Sentences on values that would be others now; the recorded ones are used."""

    @property
    def verdict(self) -> Verdict:
        """What can be expected of the comparison."""
        return "numerically close" if self.differs_now else "bitwise possible"

    @property
    def overrides(self) -> list[str]:
        """What the repeated run has otherwise: where it writes, and whom it reports to."""
        return _overrides(self.out, self.recipe)

    def describe(self) -> str:
        """What differs between then and now and what that means, a sentence a line."""
        processes = f"{self.launch.processes} process{'es' * (self.launch.processes > 1)}"
        started = f"{self.launch.strategy}, {processes}, threads {self.threads}"
        lines = [
            *(f"differs: {sentence}" for sentence in self.differs_now),
            *(f"applied: {sentence}" for sentence in self.applied),
            f"expected: {self.verdict}",
            f"training again in {self.out / 'run'}: {started}",
        ]
        return "\n".join(map(printable, lines))


def plan_reproduction(source: Path, out: Path | None) -> Plan:
    """Check that a run can be repeated and compared here; writes nothing.

    Args:
        source: a completed run.
        out: folder; must be empty or not exist. None for one beside the run.

    Raises:
        RunError: the run cannot be repeated or compared here.
        MedftError: as from `medft.check.check`.
    """
    run = RunLayout(source)
    record = _completed(run)
    recorded = read_recorded(run.record)
    launch = _launch(run, record)
    named = Path(os.path.abspath(source))  # ends in a name, also for `.`
    out = out or named.with_name(f"{named.name}-reproduced")
    check_folder_for_output(out)
    if out.resolve().is_relative_to(source.resolve()):
        raise RunError(f"expected an --out outside of the run {source}, got {out}: choose another")
    recipe = _recipe(run, record, recorded, out)
    applied, added = default_changes(recipe, recorded)
    _check_files(recipe, record)
    on_cpu = (
        bool(recorded.resolved.arguments.get("use_cpu")) or not torch.accelerator.is_available()
    )
    _check_devices(launch, on_cpu)
    checked = check(run.recipe, _overrides(out, recipe))
    now = masked(identify_run(recipe, checked.prepared, None, world_size=None))
    for part in ("data", "init_from"):
        if now.get(part) != record.get(part):
            raise RunError(
                f"expected the {part} of the run {source}, "
                f"{first_change(record.get(part), now.get(part))}: not comparable, restore it"
            )
    _check_images(checked)
    threads = num_threads() if THREADS in os.environ else launch.threads
    return Plan(
        run=run,
        out=out,
        recipe=recipe,
        launch=launch,
        recorded=recorded,
        threads=threads,
        on_cpu=on_cpu,
        differs_now=[
            *machine_changes(machine_of(record), machine_now(threads)),
            *changes_between_parts(record),
            *added,
        ],
        applied=applied,
    )


def _completed(run: RunLayout) -> dict[str, Any]:
    """The record of a completed run with its results."""
    source = run.directory
    if (
        source.exists()
        and not run.record.is_file()
        and (source.absolute().parent / "run.json").is_file()
    ):
        raise RunError(
            f"expected the output_dir of a run, {source} is a folder of its results: give "
            f"{source.parent}"
        )
    record = run.read_record()
    if record["status"] != "completed":
        raise RunError(
            f"expected a completed run in {source}, its status is {record['status']}: resume it "
            f"with train.resume_from_checkpoint=true first"
        )
    if not run.results:
        raise RunError(
            f"expected adapter/ or model/ in the run {source} to compare with, there is neither: "
            f"restore it"
        )
    return record


def _launch(run: RunLayout, record: dict[str, Any]) -> RecordedLaunch:
    if "launch" not in record:
        raise RunError(
            f"expected {run.record} to say how the run was started (launch), it does not, since an "
            f"older medft wrote it: train the run again to be able to reproduce it"
        )
    return RecordedLaunch.model_validate(record["launch"])


def _recipe(run: RunLayout, record: dict[str, Any], recorded: Recorded, out: Path) -> Recipe:
    """The recipe of a run, from its recipe.yaml, which must be that of run.json."""
    kind = SiglipRecipe if "contrastive" in record["recipe"] else DecoderRecipe
    hidden = [key for key, value in leaves(record["recipe"]) if MASK in str(value)]
    hidden = [key for key in hidden if key not in ("train.run_name", "train.report_to")]
    if hidden:
        raise RunError(
            f"expected a recipe without secrets in {run.record}, {hidden[0]} is masked: not "
            f"comparable, train again with another value"
        )
    recipe = kind.load(run.recipe)
    recipe = kind.load(run.recipe, _overrides(out, recipe))
    check_as_recorded(recipe, recorded)
    return recipe


def _overrides(out: Path, recipe: Recipe) -> list[str]:
    path = json.dumps(str(out / "run"))
    cache = ["model.vision_cache=null"] if isinstance(recipe, DecoderRecipe) else []
    return [f"train.output_dir={path}", "train.report_to=none", *cache]


def _check_files(recipe: Recipe, record: dict[str, Any]) -> None:
    """Compare base and data files with their recorded hashes, before rows are read.

    Raises:
        RunError: one is missing or has changed.
    """
    data = {f"data.{split}": getattr(recipe.data, split) for split in ("train", "validation")}
    named = {**data, "lora.init_from": recipe.lora.init_from if recipe.lora else None}
    if "sha256" in record["base"]:
        named["model.base"] = recipe.model.base
    for key, path in named.items():
        if path is not None and not Path(path).exists():
            is_relative = not Path(path).is_absolute()
            seen = f" seen from {Path.cwd()}" if is_relative else ""
            started_in = record.get("started_in", "the folder in which the run was started")
            advice = f"start medft reproduce in {started_in}" if is_relative else "restore it"
            raise RunError(f"expected {key} of the run at {path}, it is not there{seen}: {advice}")
    for split, known in record["data"].items():
        path = at_home(known["path"]) if isinstance(known, dict) and "path" in known else None
        if path and path.is_file() and file_sha256(path) != known["sha256"]:
            raise RunError(
                f"expected the {known.get('rows')} rows of data.{split} {path} as the run was "
                f"trained on them, the file has changed: not comparable, restore it"
            )
    base = masked(identify_base(recipe.model))
    if base != record["base"]:
        raise RunError(
            f"expected model.base {recipe.model.base} as the run was trained on it, "
            f"{first_change(record['base'], base)}: not comparable, restore it"
        )


def _check_images(checked: Checked) -> None:
    """Compare images that are named by their SHA-256, as `medft data chat` names them, with it.

    Raises:
        RunError: one has changed.
    """
    seen: set[Path] = set()
    for rows in checked.datasets:
        for row, images in zip(rows["id"], rows["images"], strict=True):
            for image in map(image_source, images):
                if isinstance(image, bytes) or image in seen or not _SHA256.fullmatch(image.stem):
                    continue
                seen.add(image)
                if file_sha256(image) != image.stem:
                    raise RunError(
                        f"expected the image {image} of row {row} as its name says, its content "
                        f"has changed: not comparable, restore it"
                    )


def _check_devices(launch: RecordedLaunch, on_cpu: bool) -> None:
    if not on_cpu and launch.processes > torch.accelerator.device_count():
        raise RunError(
            f"expected {launch.processes} GPUs, as many as the run's processes, found "
            f"{torch.accelerator.device_count()}: not comparable, since each step would have other "
            f"rows"
        )
