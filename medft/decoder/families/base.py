"""What differs between the families of image-text decoders, one class each.

A family is chosen by `model_type` in the base's config.json. Code elsewhere asks the family and
never tests for a name.

Shape letters in this file:
    B  rows of a batch
    S  tokens of its longest row
    I  images of the row that has most
    N  images of all its rows
    T  tiles of an image, padding included (4 in the release)
    P  features of a tile, or of an image without tiles
    D  width of the language model
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageInputs:
    """One image as the base takes it: its pixels, or the features computed from them."""

    pixel_values: Tensor | None = None
    """[3, height, width], or [T, 3, height, width] for a family with tiles."""

    aspect_ratio_id: int | None = None
    """Id of the tile arrangement, for a family with tiles."""

    num_tiles: int = 1
    """Number of tiles that are not padding; they come first."""

    features: Tensor | None = None
    """[P, D] or [T, P, D] output of tower and projector; pixel_values is then None."""

    cache_entry: str | None = None
    """Name of the vision cache entry for its features; None if they are not cached."""

    def pin_memory(self) -> "ImageInputs":
        """A copy in pinned memory, for torch's DataLoader."""
        pixels, features = (
            None if tensor is None else tensor.pin_memory()
            for tensor in (self.pixel_values, self.features)
        )
        return replace(self, pixel_values=pixels, features=features)

    @property
    def pixels(self) -> Tensor:
        """pixel_values; raises ValueError if there are none."""
        if self.pixel_values is None:
            raise ValueError("expected an image with pixels, it has features")
        return self.pixel_values


class Family:
    """Names and rules of one architecture, as transformers 5 builds it; subclassed by family."""

    model_type: ClassVar[str]
    """As in config.json."""

    parts: ClassVar[Mapping[str, str]]
    """Prefixes of module names, by part: vision, projector, language, lm_head."""

    presets: ClassVar[Mapping[str, str]]
    """Regular expressions over whole module names, by the name of a `lora.targets` preset."""

    end_of_turn: ClassVar[str]
    """The token that ends an assistant turn."""

    chat_template: ClassVar[str | None] = None
    """Chat template for bases that ship none."""

    template_arguments: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Template variables that would otherwise come from the clock."""

    has_tiles: ClassVar[bool] = False
    """Whether an image is cut into tiles, whose number `data.max_image_tiles` limits."""

    recomputes_tower: ClassVar[bool] = True
    """Whether reentrant checkpointing can train the tower, or the projector behind it."""

    overflows_float16: ClassVar[bool] = False
    """Whether activations of released models exceed what float16 can hold."""

    leaks_across_batch: ClassVar[bool] = False
    """Whether the stock code lets a row depend on the images of other rows in the batch."""

    def check_processor(self, processor: ProcessorMixin) -> None:
        """Refuse processor settings that `attention_inputs` does not support.

        Raises:
            BaseModelError: there is such a setting.
        """

    def runs_without_images(self, name: str, config: PreTrainedConfig) -> bool:
        """Whether a row without images runs the module of this name.

        Args:
            name: the module's name in the base.
            config: the base's.
        """
        return not name.startswith((self.parts["vision"], self.parts["projector"]))

    def image_token_id(self, processor: ProcessorMixin) -> int:
        """Id of the image placeholder token."""
        return processor.image_token_id

    def tokens_per_image(self, processor: ProcessorMixin) -> int:
        """Number of `image_token_id` tokens per image in the text."""
        return processor.image_seq_length

    def non_answer_token_ids(self, processor: ProcessorMixin) -> frozenset[int]:
        """Ids of tokens that never belong to an answer."""
        return frozenset({self.image_token_id(processor)})

    def expand(self, text: str, processor: ProcessorMixin) -> str:
        """The rendered text, each image's placeholder expanded to all its tokens."""
        return text

    def image_inputs(
        self, processor: ProcessorMixin, image: Image.Image, *, max_image_tiles: int
    ) -> ImageInputs:
        """The tower's inputs for one image; pixel_values [3, height, width].

        Args:
            processor: the base's.
            image: in RGB.
            max_image_tiles: maximum, for families that cut images into tiles.
        """
        pixels = processor.image_processor([image], return_tensors="pt")["pixel_values"]
        return ImageInputs(pixel_values=pixels[0])

    def attention_inputs(
        self,
        processor: ProcessorMixin,
        images: Sequence[Sequence[ImageInputs]],
        input_ids: Tensor,
        answers: Tensor,
    ) -> dict[str, Tensor]:
        """Model inputs that decide which tokens of a batch see each other and the images.

        Args:
            processor: the base's.
            images: of each row, in the order of their tokens.
            input_ids: [B, S].
            answers: [B, S], whether a token comes after the first prompt of its row.
        """
        raise NotImplementedError

    def stack_images(self, images: Sequence[Sequence[ImageInputs]]) -> dict[str, Tensor]:
        """The stock forward's inputs for images: pixel_values [N, 3, height, width]."""
        flat = [image.pixels for row in images for image in row]
        return {"pixel_values": torch.stack(flat)} if flat else {}

    def features(
        self, model: PreTrainedModel, image: ImageInputs, *, drops_padding_tiles: bool
    ) -> Tensor:
        """Features of one image, the output of tower and projector.

        Args:
            model: the base without its head.
            image: with pixels, on the model's device.
            drops_padding_tiles: leave out tiles that no token may see, for families with tiles.

        Returns:
            [P, D], or [T, P, D] for a family with tiles.
        """
        outputs = model.get_image_features(image.pixels[None])
        return outputs.pooler_output[0]

    def feature_shape(self, config: PreTrainedConfig) -> tuple[int, int]:
        """P and D of a base's features.

        Args:
            config: the base's.
        """
        raise NotImplementedError

    def merge_image_features(self, model_inputs: dict[str, Any], features: list[Tensor]) -> None:
        """Add the features of a batch's images, in order, to the inputs of the base.

        Args:
            model_inputs: keyword arguments of the base's forward; modified in place.
            features: one tensor per image.
        """
        model_inputs["pixel_values"] = torch.stack(features)

    def isolate_rows(self, model: nn.Module) -> None:
        """Make the rows of a loaded model independent of each other, where `leaks_across_batch`."""
        raise NotImplementedError

    def without_isolation(self, model: nn.Module) -> AbstractContextManager[None]:
        """A block in which a model computes what plain transformers does, despite `isolate_rows`.

        Args:
            model: with or without adapter.
        """
        return nullcontext()
