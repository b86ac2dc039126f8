"""Loads a decoder's base in the recipe's precision, 4-bit exactly where the recipe says."""

import logging
from collections.abc import Mapping

from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel

from medft.compat import keep_trainable_on_cpu
from medft.config.recipe import ModelSection, QuantizationSection
from medft.decoder.families import family_of
from medft.decoder.families.base import Family
from medft.errors import BaseModelError
from medft.models.adapter import load_adapter
from medft.models.base import check_local_base, load_config, load_weights
from medft.models.resolved import Recorded, recorded_fields
from medft.models.saved import SavedModel

logger = logging.getLogger(__name__)


def load_model(
    model: ModelSection,
    family: Family,
    quantization: QuantizationSection | None,
    *,
    dtype: str,
    recorded: Recorded | None = None,
) -> PreTrainedModel:
    """The base with its weights.

    Args:
        model: the recipe's section.
        family: the base's.
        quantization: the recipe's section; None for no quantization.
        dtype: of the weights, and of computation with 4-bit weights; "auto" keeps the stored one.
        recorded: the record of the run that is repeated.

    Raises:
        RunError: the library lacks a recorded field of the quantization.
        BaseModelError: it cannot be loaded, or the 4-bit layers are not those asked for.
    """
    config = quantization and bitsandbytes_config(quantization, family, dtype, recorded)
    loaded = load_weights(
        AutoModelForImageTextToText, model, dtype=dtype, quantization_config=config
    )
    if quantization:
        check_quantized(loaded, family, quantization)
    _keep_caps_of_attention(loaded)
    return loaded


def load_saved(saved: SavedModel, *, as_stored: bool = False) -> PeftModel | PreTrainedModel:
    """A trained decoder; an adapter sits on its base as it was trained.

    Args:
        saved: a run's, an adapter's, or a complete model.
        as_stored: load an adapter's base unquantized, in the precision its files have.

    Raises:
        BaseModelError: it cannot be loaded, or the base is not the one that was trained on.
    """
    check_local_base(saved.base)
    family = family_of(load_config(saved.base).model_type)
    saved.check()
    as_trained = saved.is_adapter and not as_stored
    model = load_model(
        saved.base,
        family,
        saved.record.quantization if as_trained else None,
        dtype=saved.base.dtype if as_trained else "auto",
    )
    if saved.record.cross_attention_fix and not as_stored:
        family.isolate_rows(model)
    return load_adapter(model, saved.folder) if saved.is_adapter else model


def _keep_caps_of_attention(model: PreTrainedModel) -> None:
    """Use eager attention if the base soft-caps its logits, which torch's own does not do."""
    text = model.config.get_text_config()
    if getattr(text, "attn_logit_softcapping", None):
        model.set_attn_implementation({"text_config": "eager"})


def bitsandbytes_config(
    quantization: QuantizationSection,
    family: Family,
    dtype: str,
    recorded: Recorded | None = None,
) -> BitsAndBytesConfig:
    """The recipe's quantization for bitsandbytes, with skipped parts as module names.

    Raises:
        RunError: as from `load_model`.
    """
    fields = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": quantization.type,
        "bnb_4bit_use_double_quant": quantization.double_quant,
        "bnb_4bit_compute_dtype": dtype,
        "llm_int8_skip_modules": [family.parts[part] for part in quantization.skip],
        **recorded_fields(BitsAndBytesConfig, recorded, "quantization"),
    }
    return BitsAndBytesConfig(**fields)


def check_quantized(model: nn.Module, family: Family, quantization: QuantizationSection) -> None:
    """Check that every linear layer outside `skip` is 4-bit and stays trainable, and none inside.

    Raises:
        BaseModelError: the 4-bit layers are not those asked for.
    """
    skipped = tuple(family.parts[part] for part in quantization.skip)
    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        wanted = not any(name == prefix or name.startswith(f"{prefix}.") for prefix in skipped)
        is_4bit = isinstance(module, Linear4bit)
        if wanted != is_4bit:
            raise BaseModelError(
                f"expected {name} to be {'4-bit' if wanted else 'unquantized'}, bitsandbytes "
                f"made it {'4-bit' if is_4bit else 'unquantized'}: report this base"
            )
        if is_4bit:
            keep_trainable_on_cpu(module)
            part = _part_of(name, family.parts)
            counts[part] = counts.get(part, 0) + 1
    listed = ", ".join(f"{count} {part}" for part, count in counts.items())
    logger.info("4-bit %s layers: %s", quantization.type, listed)


def _part_of(name: str, parts: Mapping[str, str]) -> str:
    return next((part for part, prefix in parts.items() if name.startswith(prefix)), "other")
