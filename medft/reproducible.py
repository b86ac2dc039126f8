"""What must hold before a run is repeated, and what differs between then and now.

A run, data or a base that cannot be compared is an error of one sentence; nothing is written here.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from medft.check import Checked, check
from medft.config.recipe import DecoderRecipe, Recipe, SiglipRecipe
from medft.data.rows import image_source
from medft.decoder.trainer import decoder_arguments
from medft.errors import RunError
from medft.files import check_folder_for_output, file_sha256
from medft.masking import MASK
from medft.models.base import identify_base
from medft.models.resolved import (
    THREADS,
    Part,
    Recorded,
    changed_fields,
    plain,
    public_fields,
    read_recorded,
    recorded_fields,
    resolved_arguments,
)
from medft.models.run_record import RecordedLaunch
from medft.models.saved import RunLayout
from medft.provenance import hardware, masked, medft_version, package_versions
from medft.siglip.trainer import siglip_arguments
from medft.training.resume import check_as_recorded, identify_run

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
        return "\n".join(
            [
                *(f"differs: {sentence}" for sentence in self.differs_now),
                *(f"applied: {sentence}" for sentence in self.applied),
                f"expected: {self.verdict}",
                f"training again in {self.out / 'run'}: {started}",
            ]
        )


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
    _check_files(recipe, record)
    on_cpu = (
        bool(recorded.resolved.arguments.get("use_cpu")) or not torch.accelerator.is_available()
    )
    _check_devices(launch, on_cpu)
    applied, added = _changed_defaults(recipe, recorded)
    checked = check(run.recipe, _overrides(out, recipe))
    now = masked(identify_run(recipe, checked.prepared, None, world_size=None))
    for part in ("base", "data", "init_from"):
        if now.get(part) != record.get(part):
            raise RunError(
                f"expected the {part} of the run {source}, "
                f"{_first_change(record.get(part), now.get(part))}: not comparable, restore it"
            )
    _check_images(checked)
    threads = _threads(launch)
    return Plan(
        run=run,
        out=out,
        recipe=recipe,
        launch=launch,
        recorded=recorded,
        threads=threads,
        on_cpu=on_cpu,
        differs_now=[*_differs_now(record, launch, threads), *added],
        applied=applied,
    )


def _completed(run: RunLayout) -> dict[str, Any]:
    """The record of a completed run with its results."""
    source = run.directory
    if not run.record.is_file() and (source.absolute().parent / "run.json").is_file():
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


def _threads(launch: RecordedLaunch) -> int:
    """Threads of each process: those that the user asks for now, else the recorded ones."""
    given = os.environ.get(THREADS, str(launch.threads))
    if not given.isdecimal() or int(given) < 1:
        raise RunError(f"expected a number of threads in {THREADS}, got {given!r}: correct it")
    return int(given)


def _recipe(run: RunLayout, record: dict[str, Any], recorded: Recorded, out: Path) -> Recipe:
    """The recipe of a run, from its recipe.yaml, which must be that of run.json."""
    kind = SiglipRecipe if "contrastive" in record["recipe"] else DecoderRecipe
    hidden = [key for key, value in _leaves(record["recipe"]) if MASK in str(value)]
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


def _leaves(content: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(content, dict):
        return [(prefix, content)]
    return [
        leaf
        for key, inner in content.items()
        for leaf in _leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    ]


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
    for key, path in data.items():
        known = record["data"].get(key.removeprefix("data."))
        if path and known and file_sha256(Path(path)) != known["sha256"]:
            raise RunError(
                f"expected the {known['rows']} rows of {key} {path} as the run was trained on "
                f"them, the file has changed: not comparable, restore it"
            )
    base = masked(identify_base(recipe.model))
    if base != record["base"]:
        raise RunError(
            f"expected model.base {recipe.model.base} as the run was trained on it, "
            f"{_first_change(record['base'], base)}: not comparable, restore it"
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


def _first_change(then: Any, now: Any) -> str:
    """The first value that changed in a part of the record, as text."""
    first, second = dict(_leaves(then)), dict(_leaves(now))
    name = next(key for key in {**first, **second} if first.get(key) != second.get(key))
    return f"{name or 'it'} was {first.get(name)} and is {second.get(name)}"


def _check_devices(launch: RecordedLaunch, on_cpu: bool) -> None:
    if not on_cpu and launch.processes > torch.accelerator.device_count():
        raise RunError(
            f"expected {launch.processes} GPUs, as many as the run's processes, found "
            f"{torch.accelerator.device_count()}: not comparable, since each step would have other "
            f"rows"
        )


def _defaults_now(
    recipe: Recipe, recorded: Recorded
) -> Iterator[tuple[Part, str, dict[str, Any], Callable[[str], bool]]]:
    """Of each part of a record: its name, class, fields as medft would set them now, and which.

    Raises:
        RunError: a recorded field cannot be applied.
        RecipeError: the library refuses a recorded value.
    """
    options: dict[str, Any] = {"dtype": recipe.model.dtype, "use_cpu": True}
    make: Any = siglip_arguments if isinstance(recipe, SiglipRecipe) else decoder_arguments
    make(recipe.train, recorded=recorded, **options)
    arguments = make(recipe.train, **options)
    yield "arguments", type(arguments).__name__, resolved_arguments(arguments), lambda name: True
    if recipe.lora:
        recorded_fields(LoraConfig, recorded, "lora")
        written = {"r", "lora_alpha", "lora_dropout", "target_modules", "task_type"}
        written |= {key for key, value in recipe.lora.model_dump().items() if value is not None}
        yield "lora", "LoraConfig", plain(LoraConfig()), lambda name: name not in written
    if isinstance(recipe, DecoderRecipe) and recipe.quantization:
        recorded_fields(BitsAndBytesConfig, recorded, "quantization")
        fields = public_fields(plain(BitsAndBytesConfig()))
        own = re.compile("load_in_4bit|bnb_4bit_(?!quant_storage).*|llm_int8_skip_modules")
        yield "quantization", "BitsAndBytesConfig", fields, lambda name: not own.fullmatch(name)


def _changed_defaults(recipe: Recipe, recorded: Recorded) -> tuple[list[str], list[str]]:
    """Sentences on fields that the libraries would fill in otherwise now, and on fields they add.

    Raises:
        MedftError: as from `_defaults_now`.
    """
    applied, added = [], []
    for part, name, fields, is_default in _defaults_now(recipe, recorded):
        known = getattr(recorded.resolved, part) or {}
        for field, was, value in changed_fields(part, known, fields):
            if not is_default(field):
                continue
            if field in known:
                applied.append(
                    f"{name}.{field} would be {value!r} now and was {was!r}, which is used"
                )
            else:
                added.append(f"{name}.{field} is new in the library, which sets {value!r}")
    return applied, added


def _differs_now(record: dict[str, Any], launch: RecordedLaunch, threads: int) -> list[str]:
    """Sentences on what differs between then and now, and may change the last bits of a result."""
    then = {
        "medft": record["medft"],
        "packages": record["packages"],
        "hardware": {k: v for k, v in record["hardware"].items() if k != "cpu_count"},
        "threads": launch.threads,
    }
    now = {
        "medft": medft_version(),
        "packages": package_versions(),
        "hardware": {k: v for k, v in hardware().items() if k != "cpu_count"},
        "threads": threads,
    }
    first, second = dict(_leaves(then)), dict(_leaves(masked(now)))
    sentences = [
        f"{name} was {first.get(name)} and is {second.get(name)}"
        for name in {**first, **second}
        if first.get(name) != second.get(name)
    ]
    if first.get("medft.dirty") and second.get("medft.dirty"):
        sentences.append("medft had and has uncommitted changes, which are not compared")
    return sentences
