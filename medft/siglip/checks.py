"""Checks of a SigLIP recipe against its base and launcher, made before weights are loaded."""

import logging
from collections.abc import Iterable

import numpy as np
from transformers import PreTrainedConfig, TrainingArguments

from medft.config.recipe import ModelSection, SiglipDataSection
from medft.errors import BaseModelError, RecipeError

logger = logging.getLogger(__name__)


def check_launch(model: ModelSection, arguments: TrainingArguments) -> None:
    """Refuse launchers that shard the model or round the trained parameters.

    Raises:
        RecipeError: this launcher does.
    """
    plugin = arguments.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise RecipeError(
            "expected SigLIP whole on every process, ZeRO-3 shards it, and the loss needs "
            "scale, bias and the caching pass outside the forward: use "
            "accelerate_configs/ddp.yaml or zero2.yaml"
        )
    if plugin is not None and model.dtype != "float32":
        raise RecipeError(
            f"expected model.dtype float32 under DeepSpeed, which would round adapter, scale and "
            f"bias to {model.dtype}: use accelerate_configs/ddp.yaml, or write float32"
        )


def check_sizes(config: PreTrainedConfig, data: SiglipDataSection) -> None:
    """Refuse more tokens than the base has positions for, and images smaller than a patch.

    Raises:
        RecipeError: a size is out of range.
    """
    positions = config.text_config.max_position_embeddings
    if data.max_length > positions:
        raise RecipeError(
            f"expected data.max_length of at most {positions}, the text positions of the base, "
            f"got {data.max_length}: lower it"
        )
    if data.max_length < positions:
        logger.warning(
            "captions are padded to %s tokens and the base learned to pool the last of %s: embed "
            "with the processor that is saved beside the adapter",
            data.max_length,
            positions,
        )
    patch = config.vision_config.patch_size
    if data.image_size < patch:
        raise RecipeError(
            f"expected data.image_size of at least one patch of {patch} pixels, got "
            f"{data.image_size}: raise it"
        )


def check_tokens(tokens: Iterable[bytes], config: PreTrainedConfig) -> None:
    """Refuse tokens that the base has no embedding for.

    Args:
        tokens: of each caption, as int32 bytes.
        config: the base's.

    Raises:
        BaseModelError: there is such a token.
    """
    largest = max(int(np.frombuffer(key, np.int32).max()) for key in set(tokens))
    rows = config.text_config.vocab_size
    if largest >= rows:
        raise BaseModelError(
            f"expected tokens below {rows}, the text embeddings of the base, a caption has "
            f"{largest}: the tokenizer in model.base is another model's"
        )


def check_family(config: PreTrainedConfig) -> None:
    """Refuse a base that is not a SigLIP of fixed resolution with a pooling head.

    Raises:
        BaseModelError: it has another architecture.
    """
    if config.model_type != "siglip":
        raise BaseModelError(
            f"expected a SigLIP of fixed resolution (model_type siglip), model.base has "
            f"model_type {config.model_type!r}: choose another base; decoders are trained with "
            f"decoder_qlora.py"
        )
    if not getattr(config.vision_config, "vision_use_head", True):
        raise BaseModelError(
            "expected a SigLIP whose vision tower has a pooling head, that of model.base has none "
            "and gives no embedding: choose a whole SigLIP"
        )
