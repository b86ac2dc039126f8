"""From the sections of a recipe to a decoder trainer, the one way for everybody."""

import logging
from collections.abc import Mapping
from typing import Any, Protocol

from transformers import PreTrainedModel
from trl import SFTConfig

from medft.config.lora_keys import LoraSection
from medft.config.recipe import (
    DecoderDataSection,
    DecoderModelSection,
    ModelSection,
    QuantizationSection,
)
from medft.decoder.families.base import Family
from medft.decoder.frozen_tower import install_image_hook, run_frozen_parts_without_grad
from medft.decoder.model import load_model
from medft.decoder.prepared import PreparedDecoderData
from medft.decoder.trainer import DecoderTrainer
from medft.models.lora import attach_adapter
from medft.models.resolved import Recorded, use_recorded_attention
from medft.models.saved import SavedRecord
from medft.training.doubts import warn_of_slow_device
from medft.training.mixed_precision import shard_weights_in

logger = logging.getLogger(__name__)


class LoadBase(Protocol):
    """How a base comes into being, as `medft.decoder.model.load_model` does it."""

    def __call__(
        self,
        model: ModelSection,
        family: Family,
        quantization: QuantizationSection | None,
        *,
        dtype: str,
        recorded: Recorded | None,
    ) -> PreTrainedModel:
        """The base, every weight in place."""
        ...


def build_trainer(
    model: DecoderModelSection,
    data: DecoderDataSection,
    quantization: QuantizationSection | None,
    lora: LoraSection | None,
    *,
    arguments: SFTConfig,
    prepared: PreparedDecoderData,
    base: Mapping[str, Any],
    load: LoadBase = load_model,
    recorded: Recorded | None = None,
) -> DecoderTrainer:
    """A trainer whose base, fix and adapter are those of the recipe.

    Without `lora` every weight is trained, in float32 whatever `model.dtype`.

    Args:
        model: the recipe's section.
        data: the recipe's section.
        quantization: the recipe's section.
        lora: the recipe's section; of a resumed run without `init_from`.
        arguments: from `decoder_arguments`.
        prepared: from `prepare_decoder_data`.
        base: from `identify_base`.
        load: gives the base.
        recorded: the record of the run that is repeated.

    Raises:
        RunError: an installed library lacks a recorded field.
        BaseModelError: the base cannot be loaded, or the adapter not attached.
    """
    warn_of_slow_device(prepared.base_weights, arguments)
    family = prepared.family
    dtype = model.dtype if lora else "float32"
    shard_weights_in(dtype, arguments)
    loaded = load(model, family, quantization, dtype=dtype, recorded=recorded)
    use_recorded_attention(loaded, recorded)
    if model.cross_attention_fix:
        family.isolate_rows(loaded)
    trained = loaded
    if lora:
        trained = attach_adapter(
            loaded,
            lora,
            family.presets,
            task_type="CAUSAL_LM",
            seed=arguments.seed,
            initial=prepared.initial,
            recorded=recorded,
        )
    install_tower(loaded, model, prepared)
    arguments.train_sampling_strategy = "random"  # the sampler groups, Trainer's has no lengths
    record = SavedRecord(
        family=family.model_type,
        **base,
        dtype=model.dtype,
        cross_attention_fix=model.cross_attention_fix,
        quantization=quantization,
        max_length=data.max_length,
        max_image_tiles=data.max_image_tiles,
        prompts=prepared.prompts or None,
        system=prepared.system,
        longest_answer=prepared.longest_answer,
    )
    return DecoderTrainer(trained, arguments, prepared, record)


def install_tower(
    base: PreTrainedModel, model: DecoderModelSection, prepared: PreparedDecoderData
) -> None:
    """Run the frozen parts of a base without grad, image by image, from the cache if there is one.

    Changes the base and the collator of `prepared`, which reads the cache.

    Args:
        base: its adapter attached.
        model: the recipe's section.
        prepared: from `prepare_decoder_data`.
    """
    frozen = run_frozen_parts_without_grad(base, prepared.family)
    if frozen:
        logger.info("frozen, without backward pass: %s", ", ".join(frozen))
    cache = prepared.collator.cache = prepared.open_cache(base)
    isolated = model.cross_attention_fix
    install_image_hook(base, prepared.family, drops_padding_tiles=isolated, cache=cache)
