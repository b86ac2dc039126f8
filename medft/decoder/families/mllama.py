"""Llama 3.2 Vision.

Shape letters: see `medft.decoder.families.base`.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from medft.compat import (
    MLLAMA_SEES_IMAGE,
    mllama_canvas,
    mllama_cross_attention_layers,
    mllama_cross_attention_mask,
    mllama_size_on_canvas,
)
from medft.decoder.families.base import Family, ImageInputs

_MLLAMA_LAYERS = r"model\.language_model\.layers\.\d+"
_MLLAMA_ATTENTION = r"(self_attn|cross_attn)\.(q_proj|k_proj|v_proj|o_proj)"
_MLLAMA_LANGUAGE = rf"{_MLLAMA_LAYERS}\.({_MLLAMA_ATTENTION}|mlp\.(gate_proj|up_proj|down_proj))"
_MLLAMA_PROJECTOR = r"model\.multi_modal_projector"
_MLLAMA_VISION = (
    r"model\.vision_model\.(transformer|global_transformer)\.layers\.\d+"
    r"\.(self_attn\.(q_proj|k_proj|v_proj|o_proj)|mlp\.(fc1|fc2))"
)


class Mllama(Family):
    """Llama 3.2 Vision: the text attends to image tiles by cross-attention."""

    model_type = "mllama"
    parts = MappingProxyType(
        {
            "vision": "model.vision_model",
            "projector": "model.multi_modal_projector",
            "language": "model.language_model",
            "lm_head": "lm_head",
        }
    )
    presets = MappingProxyType(
        {
            "language": _MLLAMA_LANGUAGE,
            "language_no_mlp": rf"{_MLLAMA_LAYERS}\.{_MLLAMA_ATTENTION}",
            "cross_attention": rf"{_MLLAMA_LAYERS}\.cross_attn\.(q_proj|k_proj|v_proj|o_proj)",
            "projector": _MLLAMA_PROJECTOR,
            "vision": _MLLAMA_VISION,
            "all": rf"{_MLLAMA_LANGUAGE}|{_MLLAMA_PROJECTOR}|{_MLLAMA_VISION}",
        }
    )
    end_of_turn = "<|eot_id|>"
    # The release's template writes today's date into conversations without image; its own
    # fallback is used instead, so that a row has the same tokens every day.
    template_arguments = MappingProxyType({"date_string": "26 Jul 2024"})
    has_tiles = True
    recomputes_tower = False
    leaks_across_batch = True

    def runs_without_images(self, name: str, config: PreTrainedConfig) -> bool:
        """Whether a row without images runs the module; it also skips cross-attention layers."""
        layer = re.match(r"model\.language_model\.layers\.(\d+)\.", name)
        crossed = layer and int(layer[1]) in config.text_config.cross_attention_layers
        return not crossed and super().runs_without_images(name, config)

    def tokens_per_image(self, processor: ProcessorMixin) -> int:
        """1: the features are not in the text."""
        return 1

    def image_inputs(
        self, processor: ProcessorMixin, image: Image.Image, *, max_image_tiles: int
    ) -> ImageInputs:
        """The tower's inputs for one image, cut into tiles.

        Returns:
            pixel_values [T, 3, height, width], aspect_ratio_id and num_tiles.
        """
        image_processor = processor.image_processor
        limited = _limit_tiles(image, image_processor, max_image_tiles)
        batch = image_processor([[limited]], return_tensors="pt")
        return ImageInputs(
            pixel_values=batch["pixel_values"][0, 0],
            aspect_ratio_id=int(batch["aspect_ratio_ids"]),
            num_tiles=batch["num_tiles"][0][0],
        )

    def attention_inputs(
        self,
        processor: ProcessorMixin,
        images: Sequence[Sequence[ImageInputs]],
        input_ids: Tensor,
        answers: Tensor,
    ) -> dict[str, Tensor]:
        """The mask of which token sees which tile; empty for a batch without images.

        Returns:
            cross_attention_mask [B, S, I, T].
        """
        if not any(images):
            return {}
        mask = mllama_cross_attention_mask(
            input_ids,
            [[image.num_tiles for image in row] for row in images],
            image_token_id=processor.image_token_id,
            max_image_tiles=processor.image_processor.max_image_tiles,
        )
        return {"cross_attention_mask": mask}

    def stack_images(self, images: Sequence[Sequence[ImageInputs]]) -> dict[str, Tensor]:
        """The stock forward's inputs for images, of rows with equally many.

        Returns:
            pixel_values [B, I, T, 3, height, width], aspect_ratio_ids [B, I] and aspect_ratio_mask
            [B, I, T].
        """
        if not any(images):
            return {}
        pixels = torch.stack([torch.stack([image.pixels for image in row]) for row in images])
        ids = torch.tensor([[image.aspect_ratio_id for image in row] for row in images])
        held = torch.tensor([[image.num_tiles for image in row] for row in images])
        mask = torch.arange(pixels.shape[2]) < held[..., None]
        return {
            "pixel_values": pixels,
            "aspect_ratio_ids": ids.to(pixels.device),
            "aspect_ratio_mask": mask.long().to(pixels.device),
        }

    def features(
        self, model: PreTrainedModel, image: ImageInputs, *, drops_padding_tiles: bool
    ) -> Tensor:
        """The projected states of an image's tiles [T, P, D], without padding tiles if asked."""
        states = model.vision_model(**self.stack_images([[image]])).last_hidden_state[0, 0]
        kept = states[: image.num_tiles] if drops_padding_tiles else states
        return model.multi_modal_projector(kept)

    def feature_shape(self, config: PreTrainedConfig) -> tuple[int, int]:
        """P and D of a base's features, per tile."""
        vision = config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        return patches + 1, config.text_config.hidden_size

    def merge_image_features(self, model_inputs: dict[str, Any], features: list[Tensor]) -> None:
        """Add the states for cross-attention, cut to the largest number of tiles in the batch.

        Missing images of a row and missing tiles of an image are zeros, which the mask hides.
        """
        mask = model_inputs["cross_attention_mask"]
        num_tiles = max(len(states) for states in features)
        model_inputs["cross_attention_mask"] = mask[..., :num_tiles]
        states = features[0].new_zeros(*mask.shape[::2], num_tiles, *features[0].shape[1:])
        seen = mask.amax(dim=(1, 3)).nonzero().tolist()  # (row, image) pairs that exist
        for (row, image), of_image in zip(seen, features, strict=True):
            states[row, image, : len(of_image)] = of_image
        model_inputs["cross_attention_states"] = states.flatten(0, 2)

    def isolate_rows(self, model: nn.Module) -> None:
        """Zero the cross-attention output of tokens that may see no image.

        Stock code gives such tokens (all of a row without image, and those before its first image)
        the same small weight on every vision token, including those that pad the row to the
        batch's number of images and to four tiles; it masks only the feed-forward part
        (transformers#39379).
        """
        for layer in mllama_cross_attention_layers(model):
            layer.cross_attn.isolates_rows = True
            layer.register_forward_pre_hook(_note_which_tokens_see, with_kwargs=True)
            layer.cross_attn.register_forward_hook(_mask_output)

    @contextmanager
    def without_isolation(self, model: nn.Module) -> Iterator[None]:
        """A block in which tokens that may see no image get what stock code gives them."""
        attentions = [layer.cross_attn for layer in mllama_cross_attention_layers(model)]
        isolated = [attention for attention in attentions if hasattr(attention, "isolates_rows")]
        try:
            for attention in isolated:
                attention.isolates_rows = False
            yield
        finally:
            for attention in isolated:
                attention.isolates_rows = True


def _note_which_tokens_see(layer: Any, arguments: tuple, keywords: dict[str, Any]) -> None:
    # the layer does not pass this on to its attention; a recomputed layer runs this hook again
    layer.cross_attn.tokens_that_see = keywords[MLLAMA_SEES_IMAGE]


def _mask_output(attention: Any, arguments: tuple, output: tuple) -> tuple:
    mask = attention.tokens_that_see if attention.isolates_rows else None
    return output if mask is None else (mask[:, 0] * output[0], *output[1:])


def _limit_tiles(
    image: Image.Image, processor: BaseImageProcessor, max_image_tiles: int
) -> Image.Image:
    """The image, shrunk so that the processor cuts it into at most max_image_tiles tiles.

    The processor keeps its own limit of tiles, since the base's aspect ratio ids and its padding
    depend on it.
    """
    tile, size = processor.size["height"], (image.height, image.width)
    canvas = mllama_canvas(*size, max_image_tiles=processor.max_image_tiles, tile=tile)
    if canvas[0] * canvas[1] <= max_image_tiles * tile * tile:
        return image
    canvas = mllama_canvas(*size, max_image_tiles=max_image_tiles, tile=tile)
    height, width = mllama_size_on_canvas(*size, canvas=canvas, tile=tile)
    return image.resize((width, height), Image.Resampling(processor.resample))


MLLAMA = Mllama()
