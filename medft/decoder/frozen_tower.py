"""Runs the vision tower image by image, and without backward pass where it is frozen.

Stock code runs the backward pass even of a tower without trainable parameters, see
`medft.models.frozen`; under reentrant checkpointing it then fails.

Each image goes through tower and projector alone. Its features then do not depend, to the last
bit, on the other images of the batch, so that they can be cached.
"""

import functools
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from medft.decoder.families.base import Family, ImageInputs
from medft.decoder.vision_cache import VisionCache
from medft.models.frozen import is_frozen, run_without_grad

IMAGES = "images"
"""Batch key of the images, a list of `ImageInputs`."""


def run_frozen_parts_without_grad(model: nn.Module, family: Family) -> list[str]:
    """Run tower and projector without grad, up to the first that has trainable parameters.

    Args:
        model: the base with its adapter.
        family: the base's.

    Returns:
        The parts that run without grad.
    """
    frozen = []
    for part in ("vision", "projector"):
        module = model.get_submodule(family.parts[part])
        if not is_frozen(module):
            break
        run_without_grad(module, part)
        frozen.append(part)
    return frozen


def install_image_hook(
    model: nn.Module,
    family: Family,
    *,
    drops_padding_tiles: bool,
    cache: VisionCache | None = None,
) -> None:
    """Make a base compute its images one by one, from a list under IMAGES.

    Args:
        model: the base with its adapter.
        family: the base's.
        drops_padding_tiles: leave out tiles that no token may see, which needs isolated rows.
        cache: stores the features of images that name an entry.
    """
    inner: Any = model.base_model

    def merge_images(
        inner: nn.Module, args: tuple, model_inputs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        images: list[ImageInputs] = model_inputs.pop(IMAGES, [])
        if not images:
            return None
        features = []
        computed: dict[str | None, torch.Tensor] = {}  # several rows may show the same image
        for image in images:
            known = image.features
            if known is None:
                known = computed.get(image.cache_entry)
            if known is None:
                known = family.features(inner, image, drops_padding_tiles=drops_padding_tiles)
                if cache is not None and image.cache_entry is not None:
                    cache.write(image.cache_entry, known, image.num_tiles)
                    computed[image.cache_entry] = known
            features.append(known)
        family.merge_image_features(model_inputs, features)
        return args, model_inputs

    inner.register_forward_pre_hook(merge_images, with_kwargs=True)
    if hasattr(inner, "get_image_features"):
        inner.get_image_features = _features_or_pixels(inner.get_image_features)


def _features_or_pixels(get_image_features: Any) -> Any:
    """get_image_features of a family without tiles that passes features [N, P, D] through."""

    @functools.wraps(get_image_features)
    def run(pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        if pixel_values.dim() == 3:
            return BaseModelOutputWithPooling(pooler_output=pixel_values)
        return get_image_features(pixel_values, **kwargs)

    return run
