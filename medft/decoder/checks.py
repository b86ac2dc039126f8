"""Checks of a decoder recipe against its base, made before weights are loaded."""

from pathlib import Path

from torch import nn
from transformers import PreTrainedConfig, ProcessorMixin, TrainingArguments

from medft.config.lora_keys import LoraSection
from medft.config.recipe import DecoderDataSection, DecoderModelSection
from medft.decoder.families.base import Family
from medft.errors import BaseModelError, DataError, RecipeError
from medft.files import check_folder_for_output
from medft.models.effects import ends_in
from medft.models.lora import adapted_names, plan_adapter, target_modules
from medft.models.saved import RECORD_FILE, SavedModel, SavedRecord


def check_flags(
    model: DecoderModelSection,
    data: DecoderDataSection,
    initial: SavedModel | None,
    family: Family,
) -> None:
    """Refuse flags that the family does not support or that differ from earlier training.

    Args:
        model: the recipe's section.
        data: the recipe's section.
        initial: the adapter of `lora.init_from`.
        family: the base's.

    Raises:
        BaseModelError: there is such a flag.
    """
    if model.cross_attention_fix and not family.leaks_across_batch:
        raise BaseModelError(
            f"expected model.cross_attention_fix for a family that needs it, the rows of "
            f"{family.model_type} do not see each other: remove it"
        )
    if model.dtype == "float16" and family.overflows_float16:
        raise BaseModelError(
            f"expected model.dtype bfloat16 or float32 for {family.model_type}, whose activations "
            f"exceed what float16 can hold, got float16: write one of these"
        )
    limit = type(data).model_fields["max_image_tiles"].default
    if data.max_image_tiles != limit and not family.has_tiles:
        raise BaseModelError(
            f"expected data.max_image_tiles for a family that cuts images into tiles, "
            f"{family.model_type} does not: remove it"
        )
    earlier = {initial.folder: initial.record} if initial else {}
    if (Path(model.base) / RECORD_FILE).is_file():
        earlier[Path(model.base)] = SavedRecord.read(Path(model.base))
    for folder, record in earlier.items():
        trained = record.cross_attention_fix
        if trained != model.cross_attention_fix:
            raise BaseModelError(
                f"expected model.cross_attention_fix: {str(trained).lower()}, with which "
                f"{folder} was trained, got {str(model.cross_attention_fix).lower()}: correct it"
            )


def check_image_size(processor: ProcessorMixin, config: PreTrainedConfig) -> None:
    """Refuse a processor that makes images of another size than the vision tower takes.

    Raises:
        BaseModelError: it does.
    """
    side = config.vision_config.image_size
    size = dict(processor.image_processor.size)
    made = (size.get("height"), size.get("width"))
    if made != (side, side):
        raise BaseModelError(
            f"expected images of {side} x {side} pixels, as the base's vision tower takes them, "
            f"its processor makes {made[0]} x {made[1]}: restore its preprocessor_config.json"
        )


def check_vocabulary(processor: ProcessorMixin, embeddings: int) -> None:
    """Refuse a tokenizer with more tokens than the base has embeddings.

    Args:
        processor: the base's.
        embeddings: number of rows of the base's embeddings.

    Raises:
        BaseModelError: the tokenizer has more tokens than there are rows.
    """
    tokens = len(processor.tokenizer)
    if tokens > embeddings:
        raise BaseModelError(
            f"expected a tokenizer of at most {embeddings} tokens, the rows of the base's "
            f"embeddings, it has {tokens}: some were added, put the base's own tokenizer back"
        )


def plan_targets(
    empty: nn.Module, lora: LoraSection, family: Family, initial: SavedModel | None
) -> str:
    """The plan of an adapter, as from `plan_adapter`; refuses targets that include lm_head.

    Args:
        empty: the base on the meta device; the adapter is attached to it.
        lora: the recipe's section.
        family: the base's.
        initial: the adapter of `lora.init_from`.

    Raises:
        BaseModelError: the targets are wrong.
    """
    if family.parts["lm_head"] in target_modules(empty, lora.targets, family.presets):
        raise BaseModelError(
            "expected lora.targets without lm_head, whose weight the loss reads directly so "
            "that an adapter on it would not be trained: leave it out"
        )
    return plan_adapter(empty, lora, family.presets, family.parts, initial)


def check_trained_vision(
    planned: nn.Module,
    model: DecoderModelSection,
    lora: LoraSection | None,
    family: Family,
    arguments: TrainingArguments,
) -> None:
    """Refuse settings that need tower and projector frozen, or unsharded, if they are not.

    Args:
        planned: the base on the meta device with its adapter.
        model: the recipe's section.
        lora: the recipe's section; TRL makes checkpointing of adapters under ZeRO-3 reentrant.
        family: the base's.
        arguments: the trainer's.

    Raises:
        RecipeError: there is such a setting.
    """
    if model.vision_cache and shards_weights(arguments):
        raise RecipeError(
            "expected the whole tower on every process for model.vision_cache, ZeRO-3 shards it: "
            "use accelerate_configs/ddp.yaml or zero2.yaml, or remove it"
        )
    parts = [planned.get_submodule(family.parts[part]) for part in ("vision", "projector")]
    if not any(parameter.requires_grad for part in parts for parameter in part.parameters()):
        return
    if model.vision_cache:
        raise RecipeError(
            "expected lora.targets outside tower and projector for model.vision_cache, which keeps "
            "what these make of an image, got some inside: remove model.vision_cache"
        )
    reentrant = (arguments.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    forced = lora is not None and shards_weights(arguments)  # by TRL
    if arguments.gradient_checkpointing and (reentrant or forced) and not family.recomputes_tower:
        raise RecipeError(
            f"expected lora.targets outside tower and projector for reentrant checkpointing, which "
            f"the tower of {family.model_type} cannot do{' and ZeRO-3 needs' if forced else ''}: "
            f"write train.gradient_checkpointing: false or other targets"
        )


def check_cached_tower(folder: str, config: PreTrainedConfig) -> None:
    """Refuse a vision cache that cannot be written, or whose tower has dropout.

    Args:
        folder: the cache's.
        config: the base's.

    Raises:
        RunError: the folder cannot be written.
        BaseModelError: the tower has dropout.
    """
    check_folder_for_output(Path(folder), allow_content=True)
    settings = config.vision_config.to_dict()
    drops = [name for name, value in settings.items() if "dropout" in name and value]
    if drops:
        raise BaseModelError(
            f"expected a tower without dropout for model.vision_cache, the base's config.json has "
            f"vision_config.{drops[0]}: {settings[drops[0]]}: remove model.vision_cache"
        )


def check_layers_run(
    lora: LoraSection, family: Family, config: PreTrainedConfig, empty: nn.Module
) -> None:
    """Refuse adapters and trained copies of layers that rows without images do not run.

    Args:
        lora: the recipe's section.
        family: the base's.
        config: the base's.
        empty: the base on the meta device; the adapter is attached to it.

    Raises:
        BaseModelError: there is such a layer.
    """
    copied = [
        name
        for name, _ in empty.named_modules()
        if any(ends_in(name, ending) for ending in lora.modules_to_save or [])
    ]
    plan_adapter(empty, lora, family.presets, family.parts)
    names = [*adapted_names(empty), *copied]
    idle = [name for name in names if not family.runs_without_images(f"{name}.", config)]
    if idle:
        raise BaseModelError(
            f"expected lora on layers that data.train runs, it has no image and "
            f"{len(idle)} of {len(names)} layers need one, first {idle[0]}: leave these out"
        )


def check_validation_batches(
    counts: dict[str, int], isolates_rows: bool, arguments: TrainingArguments
) -> None:
    """Refuse validation rows with different numbers of images where these must not mix.

    Raises:
        DataError: rows would see each other's images, or processes would wait for each other.
    """
    if len(counts) > 1 and arguments.per_device_eval_batch_size > 1 and not isolates_rows:
        raise DataError(
            f"expected rows with equally many images in validation, got rows with "
            f"{' and '.join(counts)}, which would see each other's images in one batch: write "
            f"train.per_device_eval_batch_size: 1 or model.cross_attention_fix: true"
        )
    if len(counts) > 1 and shards_weights(arguments):
        raise DataError(
            f"expected validation rows with equally many images under ZeRO-3, whose processes must "
            f"run the same modules at the same time, got rows with {' and '.join(counts)}: keep "
            f"one kind or use ZeRO-2"
        )


def shards_weights(arguments: TrainingArguments) -> bool:
    """Whether weights are sharded over the processes, as under ZeRO-3."""
    plugin = arguments.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3
