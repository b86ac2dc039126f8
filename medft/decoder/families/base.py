"""What differs between the families of image-text decoders, one class each.

A family is chosen by `model_type` in the base's config.json. Code elsewhere asks the family and
never tests for a name.

Shape letters in this file:
    B  rows of a batch
    S  tokens of its longest row
    I  images of the row that has most
    N  images of all its rows
    T  tiles of an image, padding included (4 in the release)
    P  tokens that the tower makes of a tile, or of an image without tiles
    D  width of the language model
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageInputs:
    """What the base takes of one image: its pixels, or the features that were made of them."""

    pixel_values: Tensor | None = None
    """[3, height, width], or [T, 3, height, width] for a family with tiles."""

    aspect_ratio_id: int | None = None
    """Of the arrangement of tiles, for a family with tiles."""

    num_tiles: int = 1
    """Tiles that hold something; they are the first."""

    features: Tensor | None = None
    """What tower and projector made of the image, [P, D] or [T, P, D]; then no pixels."""

    cache_entry: str | None = None
    """The name under which a vision cache keeps its features; None: they are not kept."""

    def pin_memory(self) -> "ImageInputs":
        """The same in pinned memory, as torch's DataLoader asks for it."""
        pixels, features = (
            None if tensor is None else tensor.pin_memory()
            for tensor in (self.pixel_values, self.features)
        )
        return replace(self, pixel_values=pixels, features=features)

    @property
    def pixels(self) -> Tensor:
        """pixel_values, which are there."""
        if self.pixel_values is None:
            raise ValueError("expected an image with pixels, it has features")
        return self.pixel_values


class Family:
    """Names and rules of one architecture, as transformers 5 builds it; each family is one."""

    model_type: ClassVar[str]
    """As in config.json."""

    parts: ClassVar[Mapping[str, str]]
    """Prefixes of module names, by part: vision, projector, language, lm_head."""

    presets: ClassVar[Mapping[str, str]]
    """Regular expressions over whole module names, by the name of a `lora.targets` preset."""

    end_of_turn: ClassVar[str]
    """The token that ends what the assistant says."""

    chat_template: ClassVar[str | None] = None
    """How a conversation is written, for bases that ship no template."""

    template_arguments: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Values that the chat template would otherwise take from the clock."""

    has_tiles: ClassVar[bool] = False
    """Whether an image is cut into tiles, whose number `data.max_image_tiles` limits."""

    recomputes_tower: ClassVar[bool] = True
    """Whether reentrant checkpointing can train the tower, or the projector behind it."""

    leaks_across_batch: ClassVar[bool] = False
    """Whether the stock code lets a row depend on the images of its neighbours."""

    def check_processor(self, processor: ProcessorMixin) -> None:
        """Refuse settings of a base that `attention_inputs` does not follow.

        Raises:
            BaseModelError: there is one.
        """

    def runs_without_images(self, name: str, config: PreTrainedConfig) -> bool:
        """Whether a row without images runs the module of this name.

        Args:
            name: in the base.
            config: of the base.
        """
        return not name.startswith((self.parts["vision"], self.parts["projector"]))

    def image_token_id(self, processor: ProcessorMixin) -> int:
        """The token that stands for what the tower sees."""
        return processor.image_token_id

    def tokens_per_image(self, processor: ProcessorMixin) -> int:
        """How often `image_token_id` stands in the text for one image."""
        return processor.image_seq_length

    def non_answer_token_ids(self, processor: ProcessorMixin) -> frozenset[int]:
        """Tokens that are no part of an answer."""
        return frozenset({self.image_token_id(processor)})

    def expand(self, text: str, processor: ProcessorMixin) -> str:
        """The text of a chat template with room for each image's features."""
        return text

    def image_inputs(
        self, processor: ProcessorMixin, image: Image.Image, *, max_image_tiles: int
    ) -> ImageInputs:
        """One image for the tower; pixel_values [3, height, width].

        Args:
            processor: of the base.
            image: in RGB.
            max_image_tiles: for families that cut images into tiles.
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
        """What decides which tokens of a batch see each other and the images.

        Args:
            processor: of the base.
            images: of each row, in the order of their tokens.
            input_ids: [B, S].
            answers: [B, S], whether a token stands behind the first prompt of its row.
        """
        raise NotImplementedError

    def stack_images(self, images: Sequence[Sequence[ImageInputs]]) -> dict[str, Tensor]:
        """Images as the stock forward takes them: pixel_values [N, 3, height, width]."""
        flat = [image.pixels for row in images for image in row]
        return {"pixel_values": torch.stack(flat)} if flat else {}

    def features(
        self, model: PreTrainedModel, image: ImageInputs, *, drops_padding_tiles: bool
    ) -> Tensor:
        """What tower and projector make of one image.

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
            config: of the base.
        """
        raise NotImplementedError

    def merge_image_features(self, model_inputs: dict[str, Any], features: list[Tensor]) -> None:
        """Put the features of a batch's images, in order, among the inputs of the base.

        Args:
            model_inputs: keywords of the base's forward; changed.
            features: of all images.
        """
        model_inputs["pixel_values"] = torch.stack(features)

    def isolate_rows(self, model: nn.Module) -> None:
        """Make the rows of a loaded model independent of each other, where `leaks_across_batch`."""
        raise NotImplementedError
