"""A SigLIP base at the recipe's image size, its learned scale and bias trainable.

The scale and bias are bare parameters: PEFT freezes them and leaves them out of an adapter, so
they are unfrozen here and saved in medft.json.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, ProcessorMixin, Siglip2Tokenizer, SiglipModel

from medft.compat import replace_position_embedding
from medft.config.lora_keys import LoraSection
from medft.config.recipe import ModelSection
from medft.errors import BaseModelError
from medft.models.adapter import load_adapter, without_adapter
from medft.models.base import (
    check_local_base,
    commit_of,
    load_processor,
    load_weights,
    readable_base,
)
from medft.models.lora import cast_trainable_to_float32
from medft.models.saved import SavedModel, SavedRecord
from medft.siglip.pooling_head import split_pooling_head

logger = logging.getLogger(__name__)

PARTS: Mapping[str, str] = MappingProxyType({"vision": "vision_model", "text": "text_model"})
"""Prefixes of module names, by tower."""

_LAYER = r"encoder\.layers\.\d+\.(self_attn\.(q_proj|k_proj|v_proj|out_proj)|mlp\.(fc1|fc2))"
_HEAD = r"head\.(attention\.(q_proj|k_proj|v_proj|out_proj)|mlp\.(fc1|fc2))"

PRESETS: Mapping[str, str] = MappingProxyType(
    {
        "text": rf"text_model\.{_LAYER}",
        "vision": rf"vision_model\.({_LAYER}|{_HEAD})",
        "both": rf"text_model\.{_LAYER}|vision_model\.({_LAYER}|{_HEAD})",
        "vision_no_head": rf"vision_model\.{_LAYER}",
        "both_no_head": rf"(text_model|vision_model)\.{_LAYER}",
    }
)
"""Regular expressions over whole module names, by the name of a `lora.targets` preset."""

HEAD_PRESETS = ("vision", "both")
"""Presets that include the pooling head, whose attention must be split first."""


def splits_head(lora: LoraSection | None) -> bool:
    """Whether an adapter sits on the pooling head."""
    return lora is not None and lora.targets in HEAD_PRESETS


def load_siglip_processor(
    model: ModelSection, *, image_size: int, max_length: int
) -> ProcessorMixin:
    """The base's processor, for images of `image_size` and texts of `max_length` tokens.

    Texts are lowercased and padded on the right. Released SigLIP 2 models name Gemma's tokenizer,
    which keeps upper case; they were trained on lower case (transformers#43054). transformers' own
    Siglip2Tokenizer replaces it, also in saved processors.

    Raises:
        BaseModelError: it cannot be read.
    """
    processor = load_processor(model)
    if processor.tokenizer("A")["input_ids"] != processor.tokenizer("a")["input_ids"]:
        logger.info("the base's tokenizer keeps upper case: Siglip2Tokenizer takes its place")
        with readable_base(model):
            processor.tokenizer = Siglip2Tokenizer.from_pretrained(
                model.base, revision=commit_of(model), trust_remote_code=False
            )
    processor.tokenizer.padding_side = "right"
    processor.tokenizer.model_max_length = max_length
    processor.image_processor.size = {"height": image_size, "width": image_size}
    return processor


def load_model(model: ModelSection, lora: LoraSection | None, *, image_size: int) -> SiglipModel:
    """The base with its weights, its position embeddings interpolated to `image_size`.

    Its towers are in the recipe's precision; scale and bias stay float32, since bfloat16 turns a
    scale of 117.3 into 115.6.

    Args:
        model: the recipe's section.
        lora: the recipe's section; None is full fine-tuning, for which all weights are float32.
        image_size: side of the square input in pixels.

    Raises:
        BaseModelError: it cannot be loaded.
    """
    loaded = load_weights(AutoModel, model, dtype=torch.float32)
    resize_positions(loaded, image_size)
    if splits_head(lora):
        split_pooling_head(loaded)
    if lora:
        for tower in PARTS.values():
            loaded.get_submodule(tower).to(getattr(torch, model.dtype))
    return loaded


def resize_positions(model: SiglipModel, image_size: int) -> None:
    """Interpolate the vision tower's position embeddings to another input size, once.

    The result equals what the tower does on every forward under interpolate_pos_encoding=True;
    afterwards the plain forward takes images of the new size and the saved config says so.
    """
    config = model.config.vision_config
    if image_size == config.image_size:
        return
    embeddings = model.vision_model.embeddings
    old, new = config.image_size // config.patch_size, image_size // config.patch_size
    weight = embeddings.position_embedding.weight
    grid = weight.detach().float().view(1, old, old, -1).permute(0, 3, 1, 2)
    resized = functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    resized = resized.permute(0, 2, 3, 1).reshape(new * new, -1).to(weight)
    replace_position_embedding(embeddings, resized, image_size=image_size)
    config.image_size = image_size


def bare_model(model: nn.Module) -> SiglipModel:
    """The SigLIP inside an adapter, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def scale_and_bias(model: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """The learned log scale and bias of the logits."""
    bare = bare_model(model)
    return bare.logit_scale, bare.logit_bias


def train_scale_and_bias(model: nn.Module) -> None:
    """Unfreeze scale and bias, which PEFT froze, in float32."""
    for parameter in scale_and_bias(model):
        parameter.requires_grad_(True)
    cast_trainable_to_float32(model)


def scale_and_bias_record(model: nn.Module) -> dict[str, float]:
    """The values of scale and bias for medft.json, exact to the bit."""
    scale, bias = scale_and_bias(model)
    return {"logit_scale": exact_float(scale), "logit_bias": exact_float(bias)}


def restore_scale_and_bias(model: nn.Module, record: SavedRecord) -> None:
    """Set scale and bias, in float32, from the record of an adapter.

    Raises:
        BaseModelError: it lacks them.
    """
    if record.logit_scale is None or record.logit_bias is None:
        raise BaseModelError(
            "expected logit_scale and logit_bias in the record of an adapter, they are missing: "
            "give an adapter that siglip_lora.py trained"
        )
    with torch.no_grad():
        values = (record.logit_scale, record.logit_bias)
        for value, parameter in zip(values, scale_and_bias(model), strict=True):
            parameter.data = parameter.data.float()
            parameter.fill_(value)


def load_saved(saved: SavedModel) -> PeftModel | SiglipModel:
    """A trained SigLIP in the precision its base is stored in, image size and scale restored.

    Args:
        saved: a run's, an adapter's, or a complete model.

    Raises:
        BaseModelError: it cannot be loaded, or the base is not the one that was trained on.
    """
    check_local_base(saved.base)
    saved.check()
    model = load_weights(AutoModel, saved.base, dtype="auto")
    if not saved.is_adapter:
        return model
    resize_positions(model, saved.record.image_size or model.config.vision_config.image_size)
    if saved.record.splits_head:
        split_pooling_head(model)
    untrained = torch.stack([parameter.detach().float() for parameter in scale_and_bias(model)])
    model.register_buffer("untrained_scale_and_bias", untrained, persistent=False)
    adapted = load_adapter(model, saved.folder)
    restore_scale_and_bias(adapted, saved.record)
    return adapted


@contextmanager
def untrained(adapted: nn.Module) -> Iterator[None]:
    """A block in which a model from `load_saved` is its base, with that one's scale and bias.

    Raises:
        RunError: the model has no adapter.
    """
    with without_adapter(adapted):
        trained = [parameter.data for parameter in scale_and_bias(adapted)]
        of_base = bare_model(adapted).get_buffer("untrained_scale_and_bias")
        try:
            for value, parameter in zip(of_base, scale_and_bias(adapted), strict=True):
                parameter.data = value
            yield
        finally:
            for value, parameter in zip(trained, scale_and_bias(adapted), strict=True):
                parameter.data = value


def embed(model: nn.Module, input_ids: Tensor, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings of images and texts as the towers return them, not normalized.

    Args:
        model: SiglipModel, with or without adapter, or a wrapper around it.
        input_ids: [B, S], padded to the model's length; no attention mask, as in SigLIP's training.
        pixel_values: [B, 3, height, width].

    Returns:
        Two tensors [B, D].
    """
    outputs = model(input_ids=input_ids, pixel_values=pixel_values)
    return outputs.vision_model_output.pooler_output, outputs.text_model_output.pooler_output


def embed_images(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Embeddings [B, D] of images [B, 3, height, width] as the tower returns them."""
    return bare_model(model).vision_model(pixel_values=pixel_values).pooler_output


def embed_texts(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Embeddings [B, D] of texts [B, S], padded as in `embed`, as the tower returns them."""
    return bare_model(model).text_model(input_ids=input_ids).pooler_output


def exact_float(parameter: torch.Tensor) -> float:
    """A one-element float32 parameter as a number that JSON preserves bit for bit."""
    return float(parameter.detach().float().cpu().reshape(()).item())
