"""From the sections of a recipe to a SigLIP trainer, the one way for everybody."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn
from transformers import SiglipModel, TrainingArguments

from medft.config.lora_keys import LoraSection
from medft.config.recipe import (
    ContrastiveSection,
    ModelSection,
    SiglipDataSection,
)
from medft.models.lora import attach_adapter
from medft.models.resolved import Recorded, use_recorded_attention
from medft.models.saved import SavedRecord
from medft.siglip.model import (
    PRESETS,
    load_model,
    restore_scale_and_bias,
    splits_head,
    train_scale_and_bias,
)
from medft.siglip.prepared import PreparedSiglipData
from medft.siglip.trainer import SiglipTrainer


class LoadBase(Protocol):
    """How a base comes into being, as `medft.siglip.model.load_model` does it."""

    def __call__(
        self, model: ModelSection, lora: LoraSection | None, *, image_size: int
    ) -> SiglipModel:
        """The base at its image size, every weight in place."""
        ...


def build_trainer(
    model: ModelSection,
    data: SiglipDataSection,
    lora: LoraSection | None,
    contrastive: ContrastiveSection,
    *,
    arguments: TrainingArguments,
    prepared: PreparedSiglipData,
    base: Mapping[str, Any],
    load: LoadBase = load_model,
    recorded: Recorded | None = None,
) -> SiglipTrainer:
    """A trainer whose base and adapter are those of the recipe, scale and bias trained.

    Args:
        model: the recipe's section.
        data: the recipe's section.
        lora: the recipe's section; of a resumed run without `init_from`.
        contrastive: the recipe's section.
        arguments: from `siglip_arguments`.
        prepared: from `prepare_siglip_data`.
        base: from `identify_base`.
        load: gives the base.
        recorded: the record of the run that is repeated.

    Raises:
        RunError: an installed library lacks a recorded field.
        BaseModelError: the base cannot be loaded, or the adapter not attached.
    """
    loaded = load(model, lora, image_size=data.image_size)
    use_recorded_attention(loaded, recorded)
    trained: nn.Module = loaded
    if lora:
        trained = attach_adapter(
            loaded,
            lora,
            PRESETS,
            task_type=None,
            seed=arguments.seed,
            initial=prepared.initial,
            recorded=recorded,
        )
        train_scale_and_bias(trained)
        if prepared.initial:
            restore_scale_and_bias(trained, prepared.initial.record)
    record = SavedRecord(
        family="siglip",
        **base,
        image_size=data.image_size,
        max_length=data.max_length,
        dtype=model.dtype,
        caption=data.caption,
        splits_head=splits_head(lora),
    )
    return SiglipTrainer(trained, arguments, prepared, contrastive, record)
