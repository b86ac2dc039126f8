"""The vision tower: image by image, and without backward pass where nothing in it is trained.

Stock code runs the backward pass of a tower without one trainable parameter, see
`medft.models.frozen`; under reentrant checkpointing it then fails.

Each image goes through tower and projector by itself. What comes out then does not depend on the
images beside it, not in the last bit, which is what makes it worth keeping.
"""

import functools
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from medft.decoder.families import Family
from medft.decoder.vision_cache import ENTRY, VisionCache
from medft.models.frozen import is_frozen, run_without_grad

PICTURES = "pictures"
"""Key of a batch's images, a list of `medft.decoder.families.Picture`."""


def run_frozen_parts_without_grad(model: nn.Module, family: Family) -> list[str]:
    """Make tower and projector run without grad as far as nothing in them, or before, is trained.

    Args:
        model: the base, its adapter attached.
        family: of the base.

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


def take_pictures(
    model: nn.Module, family: Family, *, prunes: bool, cache: VisionCache | None = None
) -> None:
    """Make a base take its images one by one, as a list under PICTURES.

    Args:
        model: the base, its adapter attached.
        family: of the base.
        prunes: leave out features that no token may see, as rows that are separate allow.
        cache: takes the features of pictures that name an entry.
    """
    inner = model.base_model

    def place_features(
        inner: nn.Module, args: tuple, inputs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        pictures = inputs.pop(PICTURES, [])
        if not pictures:
            return None
        features = []
        computed: dict[str, torch.Tensor] = {}  # several rows may show the same image
        for picture in pictures:
            known = picture.get("features", computed.get(picture.get(ENTRY)))
            if known is None:
                known = family.features(inner, picture, prunes=prunes)
                if cache is not None:
                    cache.write(picture[ENTRY], known, picture.get("num_tiles", 1))
                    computed[picture[ENTRY]] = known
            features.append(known)
        family.place(inputs, features)
        return args, inputs

    inner.register_forward_pre_hook(place_features, with_kwargs=True)
    if hasattr(inner, "get_image_features"):
        inner.get_image_features = _features_or_pixels(inner.get_image_features)


def _features_or_pixels(get_image_features: Any) -> Any:
    """The method of a family without tiles, which lets features [N, P, D] pass as they are."""

    @functools.wraps(get_image_features)
    def run(pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        if pixel_values.dim() == 3:
            return BaseModelOutputWithPooling(pooler_output=pixel_values)
        return get_image_features(pixel_values, **kwargs)

    return run
