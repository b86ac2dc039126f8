"""Checks of a recipe that need no weights, and their description."""

from dataclasses import asdict, dataclass
from pathlib import Path

from datasets import Dataset
from transformers import TrainingArguments

from medft.config.command_line import recipe_class
from medft.config.lora_keys import LoraSection
from medft.config.recipe import DecoderRecipe, Recipe, SiglipRecipe
from medft.data.decoded import decode_images
from medft.data.rows import describe_counts
from medft.decoder.prepared import PreparedDecoderData, prepare_decoder_data
from medft.decoder.trainer import decoder_arguments
from medft.errors import ErrorCollector
from medft.siglip.collator import PairDataset
from medft.siglip.prepared import PreparedSiglipData, prepare_siglip_data
from medft.siglip.trainer import siglip_arguments
from medft.training.arguments import batch_arithmetic
from medft.training.checkpoints import state_of
from medft.training.resume import check_output_dir, check_outside_base
from medft.training.run_lock import refuse_visible_run
from medft.training.same_run import identify_run
from medft.training.schedule import Schedule, schedule


@dataclass(frozen=True, slots=True)
class Checked:
    """A recipe that passed every check that needs no weights."""

    recipe: Recipe
    prepared: PreparedDecoderData | PreparedSiglipData
    batch: dict[str, int]
    schedule: Schedule

    @property
    def datasets(self) -> list[Dataset]:
        """Training and validation rows, as `load_rows` gave them."""
        sides = (self.prepared.train, self.prepared.validation)
        found = [rows for rows in sides if rows is not None]
        return [rows.rows if isinstance(rows, PairDataset) else rows for rows in found]


def check(file: Path, overrides: list[str]) -> Checked:
    """Check a recipe as its script does before loading weights: schema, files, base.

    Raises:
        MedftError: with everything that is wrong; of images, their headers alone are read.
        NothingToDo: the run is completed, and was to be continued only if it was not.
    """
    recipe = recipe_class(file, overrides).load(file, overrides)
    collector = ErrorCollector()
    checkpoint = None
    with collector.gather():
        check_outside_base(recipe)
        refuse_visible_run(Path(recipe.train.output_dir))
        checkpoint = check_output_dir(recipe.train)
    lora = recipe.initial_lora(resumes=checkpoint is not None)
    with collector.gather():
        prepared, arguments = _prepare(recipe, lora)
    collector.raise_any()
    if recipe.train.resume_from_checkpoint or prepared.initial:
        identify_run(recipe, prepared, checkpoint, world_size=None)
    batch = batch_arithmetic(prepared.batches_per_epoch, arguments)
    plan = schedule(
        arguments,
        steps=batch["steps"],
        steps_per_epoch=batch["steps_per_epoch"],
        start=state_of(checkpoint).global_step if checkpoint else 0,
    )
    return Checked(recipe, prepared, batch, plan)


def _prepare(
    recipe: Recipe, lora: LoraSection | None
) -> tuple[PreparedDecoderData | PreparedSiglipData, TrainingArguments]:
    dtype = recipe.model.dtype
    if isinstance(recipe, SiglipRecipe):
        arguments = siglip_arguments(recipe.train, dtype=dtype, use_cpu=True)
        contrastive = recipe.contrastive
        pairs = prepare_siglip_data(recipe.model, recipe.data, lora, contrastive, arguments)
        return pairs, arguments
    assert isinstance(recipe, DecoderRecipe)
    arguments = decoder_arguments(recipe.train, dtype=dtype, use_cpu=True)
    return prepare_decoder_data(recipe.model, recipe.data, lora, arguments), arguments


def check_images(checked: Checked) -> int:
    """Decode every image of training and validation rows, once each; returns how many there are.

    Raises:
        DataError: with a sentence for each row whose image cannot be decoded.
    """
    return decode_images(checked.datasets)


def describe_check(checked: Checked) -> str:
    """The result of a check as text: resolved recipe, rows, targets, examples, batch arithmetic."""
    recipe, prepared, batch = checked.recipe, checked.prepared, checked.batch
    lines = [recipe.dump()]
    for split, known in prepared.record.items():
        counts = {name: count for name, count in known.items() if name not in ("path", "sha256")}
        lines.append(f"{split}: {describe_counts(counts)}")
    lines += [f"adapters: {prepared.adapter_plan}"]
    if isinstance(prepared, PreparedDecoderData) and (plan := prepared.cache_plan()):
        lines.append(plan)
    if isinstance(prepared, PreparedSiglipData):
        lines.append(f"compared on one process: {describe_counts(asdict(prepared.batches))}")
    lines += [f"example: {example}" for example in prepared.examples()]
    lines += [
        f"batch: {batch['per_device']} per device x {batch['accumulation']} accumulation x "
        f"{batch['world']} devices = {batch['effective']} rows a step",
        f"steps: {batch['steps']} ({batch['steps_per_epoch']} an epoch), of which "
        f"{batch['warmup_steps']} warm up",
        *checked.schedule.sentences(),
    ]
    return "\n".join(lines)
