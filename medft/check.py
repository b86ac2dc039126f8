"""What can be known of a recipe before any weights are loaded."""

from dataclasses import asdict, dataclass
from pathlib import Path

from medft.config.recipe import Recipe, SiglipRecipe
from medft.data.chat import describe_counts
from medft.decoder import prepared as decoder_prepared
from medft.decoder.prepared import DecoderInputs
from medft.decoder.trainer import decoder_arguments
from medft.errors import Findings
from medft.models.base import identify_base
from medft.models.lora import initial_adapter
from medft.siglip import prepared as siglip_prepared
from medft.siglip.prepared import SiglipInputs
from medft.siglip.trainer import siglip_arguments
from medft.training.launch import recipe_class
from medft.training.run import batch_arithmetic, check_output_dir, check_same_run


@dataclass(frozen=True, slots=True)
class Checked:
    """A recipe that passed every check that needs no weights."""

    recipe: Recipe
    inputs: DecoderInputs | SiglipInputs
    batch: dict[str, int]


def check(file: Path, overrides: list[str]) -> Checked:
    """Check a recipe as its script does before loading weights: schema, files, base.

    Raises:
        MedftError: with everything that is wrong.
    """
    recipe = recipe_class(file, overrides).load(file, overrides)
    findings = Findings()
    checkpoint = None
    with findings.gather():
        checkpoint = check_output_dir(recipe.train)
    lora = recipe.lora.resumed() if checkpoint and recipe.lora else recipe.lora
    with findings.gather():
        if isinstance(recipe, SiglipRecipe):
            arguments = siglip_arguments(recipe.train, dtype=recipe.model.dtype, use_cpu=True)
            inputs = siglip_prepared.prepare_inputs(
                recipe.model, recipe.data, lora, recipe.contrastive, arguments
            )
        else:
            arguments = decoder_arguments(recipe.train, dtype=recipe.model.dtype, use_cpu=True)
            inputs = decoder_prepared.prepare_inputs(recipe.model, recipe.data, lora, arguments)
    findings.raise_any()
    if checkpoint or (lora and lora.init_from):
        base = identify_base(recipe.model, inputs.config)
        initial_adapter(lora, base)
    if checkpoint:
        check_same_run(recipe, base, inputs.record, checkpoint, None)
    return Checked(recipe, inputs, batch_arithmetic(inputs.rows_per_epoch, arguments))


def describe_check(checked: Checked) -> str:
    """What a check found, for reading: the resolved recipe, rows, targets, examples, arithmetic."""
    recipe, inputs, batch = checked.recipe, checked.inputs, checked.batch
    lines = [recipe.dump()]
    for split, known in inputs.record.items():
        counts = {name: count for name, count in known.items() if name not in ("path", "sha256")}
        lines.append(f"{split}: {describe_counts(counts)}")
    lines += [f"adapters: {inputs.adapter_plan}"]
    if isinstance(inputs, DecoderInputs) and (plan := inputs.cache_plan()):
        lines.append(plan)
    if isinstance(inputs, SiglipInputs):
        lines.append(f"compared on one process: {describe_counts(asdict(inputs.batches))}")
    lines += [f"example: {example}" for example in inputs.examples()]
    lines += [
        f"batch: {batch['per_device']} per device x {batch['accumulation']} accumulation x "
        f"{batch['world']} devices = {batch['effective']} rows a step",
        f"steps: {batch['steps']} ({batch['steps_per_epoch']} an epoch), of which "
        f"{batch['warmup_steps']} warm up",
    ]
    return "\n".join(lines)
