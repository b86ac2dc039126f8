"""What differs between the families of image-text decoders, one class each.

A family is chosen by `model_type` in the base's config.json. Code elsewhere asks the family and
never tests for a name.

Shape letters in this file:
    B  rows of a batch
    S  tokens of its longest row
    I  images of the row that has most
    N  images of all its rows
    T  tiles of an image; of a picture 4, padding included
    P  tokens that the tower makes of a tile, or of an image without tiles
    D  width of the language model
"""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedConfig, ProcessorMixin
from transformers.models.mllama.image_processing_pil_mllama import (
    get_image_size_fit_to_canvas,
    get_optimal_tiled_canvas,
)
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from medft.errors import BaseModelError

Picture = dict[str, Any]
"""What the tower takes of one image, as tensors without batch dimension: pixel_values and, by
family, more; or, under "features", what tower and projector made of it."""


class Family:
    """Names and rules of one architecture, as transformers 5 builds it."""

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

    mixes_rows: ClassVar[bool] = False
    """Whether the stock code lets a row depend on the images of its neighbours."""

    def check_processor(self, processor: ProcessorMixin) -> None:
        """Refuse settings of a base that `inputs` does not follow.

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

    def never_labels(self, processor: ProcessorMixin) -> frozenset[int]:
        """Tokens that are no part of an answer."""
        return frozenset({self.image_token_id(processor)})

    def expand(self, text: str, processor: ProcessorMixin) -> str:
        """The text of a chat template with room for each image's features."""
        return text

    def picture(
        self, processor: ProcessorMixin, image: Image.Image, *, max_image_tiles: int
    ) -> Picture:
        """One image for the tower; pixel_values [3, height, width].

        Args:
            processor: of the base.
            image: in RGB.
            max_image_tiles: for families that cut images into tiles.
        """
        pixels = processor.image_processor([image], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels[0]}

    def inputs(
        self,
        processor: ProcessorMixin,
        pictures: Sequence[Sequence[Picture]],
        input_ids: Tensor,
        answers: Tensor,
    ) -> dict[str, Tensor]:
        """What tells the tokens of a batch how to see each other and the images.

        Args:
            processor: of the base.
            pictures: of each row, in the order of their tokens.
            input_ids: [B, S].
            answers: [B, S], whether a token stands behind the first prompt of its row.
        """
        raise NotImplementedError

    def stack(self, pictures: Sequence[Sequence[Picture]]) -> dict[str, Tensor]:
        """Pictures as the stock forward takes them: pixel_values [N, 3, height, width]."""
        flat = [picture["pixel_values"] for row in pictures for picture in row]
        return {"pixel_values": torch.stack(flat)} if flat else {}

    def features(self, model: nn.Module, picture: Picture, *, prunes: bool) -> Tensor:
        """What tower and projector make of one picture.

        Args:
            model: the base without its head.
            picture: on the model's device.
            prunes: leave out what no token may see, for families with tiles.

        Returns:
            [P, D], or [T, P, D] for a family with tiles.
        """
        outputs = model.get_image_features(picture["pixel_values"][None])
        return outputs.pooler_output[0]

    def feature_shape(self, config: PreTrainedConfig) -> tuple[int, int]:
        """P and D of a base's features.

        Args:
            config: of the base.
        """
        raise NotImplementedError

    def place(self, inputs: dict[str, Any], features: list[Tensor]) -> None:
        """Put the features of a batch's images, in order, among the inputs of the base.

        Args:
            inputs: keywords of the base's forward; changed.
            features: of all images.
        """
        inputs["pixel_values"] = torch.stack(features)

    def separate_rows(self, model: nn.Module) -> None:
        """Make the rows of a loaded model independent of each other, where `mixes_rows`."""
        raise NotImplementedError


_MLLAMA_LAYERS = r"model\.language_model\.layers\.\d+"
_MLLAMA_ATTENTION = r"(self_attn|cross_attn)\.(q_proj|k_proj|v_proj|o_proj)"
_MLLAMA_LANGUAGE = rf"{_MLLAMA_LAYERS}\.({_MLLAMA_ATTENTION}|mlp\.(gate_proj|up_proj|down_proj))"
_MLLAMA_PROJECTOR = r"model\.multi_modal_projector"
_MLLAMA_VISION = (
    r"model\.vision_model\.(transformer|global_transformer)\.layers\.\d+"
    r"\.(self_attn\.(q_proj|k_proj|v_proj|o_proj)|mlp\.(fc1|fc2))"
)


class Mllama(Family):
    """Llama 3.2 Vision: tiles of the images enter the text by cross-attention."""

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
    # The release writes today's date into conversations without image; it is frozen to the
    # template's own fallback, so that a row has the same tokens tomorrow.
    template_arguments = MappingProxyType({"date_string": "26 Jul 2024"})
    has_tiles = True
    recomputes_tower = False
    mixes_rows = True

    def runs_without_images(self, name: str, config: PreTrainedConfig) -> bool:
        """Not in layers of cross-attention either, which such a row leaves out whole."""
        layer = re.match(r"model\.language_model\.layers\.(\d+)\.", name)
        crossed = layer and int(layer[1]) in config.text_config.cross_attention_layers
        return not crossed and super().runs_without_images(name, config)

    def tokens_per_image(self, processor: ProcessorMixin) -> int:
        """One: the features are not in the text."""
        return 1

    def picture(
        self, processor: ProcessorMixin, image: Image.Image, *, max_image_tiles: int
    ) -> Picture:
        """One image in tiles.

        Returns:
            pixel_values [T, 3, height, width], and as numbers aspect_ratio_id and num_tiles, how
            many of the tiles hold something; they are the first.
        """
        image_processor = processor.image_processor
        limited = _limit_tiles(image, image_processor, max_image_tiles)
        batch = image_processor([[limited]], return_tensors="pt")
        return {
            "pixel_values": batch["pixel_values"][0, 0],
            "aspect_ratio_id": int(batch["aspect_ratio_ids"]),
            "num_tiles": batch["num_tiles"][0][0],
        }

    def inputs(
        self,
        processor: ProcessorMixin,
        pictures: Sequence[Sequence[Picture]],
        input_ids: Tensor,
        answers: Tensor,
    ) -> dict[str, Tensor]:
        """Which token sees which tile; nothing for a batch without images.

        Returns:
            cross_attention_mask [B, S, I, T].
        """
        if not any(pictures):
            return {}
        spans = [
            get_cross_attention_token_mask(row, processor.image_token_id)
            for row in input_ids.tolist()
        ]
        mask = convert_sparse_cross_attention_mask_to_dense(
            spans,
            num_tiles=[[picture["num_tiles"] for picture in row] for row in pictures],
            max_num_tiles=processor.image_processor.max_image_tiles,
            length=input_ids.shape[1],
        )
        return {"cross_attention_mask": torch.from_numpy(mask)}

    def stack(self, pictures: Sequence[Sequence[Picture]]) -> dict[str, Tensor]:
        """Pictures of rows with equally many, as the stock forward takes them.

        Returns:
            pixel_values [B, I, T, 3, height, width], aspect_ratio_ids [B, I] and aspect_ratio_mask
            [B, I, T].
        """
        if not any(pictures):
            return {}
        pixels = torch.stack([torch.stack([p["pixel_values"] for p in row]) for row in pictures])
        ids = torch.tensor([[p["aspect_ratio_id"] for p in row] for row in pictures])
        held = torch.tensor([[p["num_tiles"] for p in row] for row in pictures])
        mask = torch.arange(pixels.shape[2]) < held[..., None]
        return {
            "pixel_values": pixels,
            "aspect_ratio_ids": ids.to(pixels.device),
            "aspect_ratio_mask": mask.long().to(pixels.device),
        }

    def features(self, model: nn.Module, picture: Picture, *, prunes: bool) -> Tensor:
        """The projected states of a picture's tiles [T, P, D]; of its own only, if `prunes`."""
        stacked = self.stack([[picture]])
        states = model.vision_model(**stacked).last_hidden_state[0, 0]
        return model.multi_modal_projector(states[: picture["num_tiles"]] if prunes else states)

    def feature_shape(self, config: PreTrainedConfig) -> tuple[int, int]:
        """P and D of a base's features, for each tile."""
        vision = config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        return patches + 1, config.text_config.hidden_size

    def place(self, inputs: dict[str, Any], features: list[Tensor]) -> None:
        """Hand the states to cross-attention, tiles beyond the batch's largest number left out.

        Rows with fewer images, and images with fewer tiles, are filled with zeros, which the mask
        hides.
        """
        mask = inputs["cross_attention_mask"]
        num_tiles = max(len(states) for states in features)
        inputs["cross_attention_mask"] = mask[..., :num_tiles]
        states = features[0].new_zeros(*mask.shape[::2], num_tiles, *features[0].shape[1:])
        seen = mask.amax(dim=(1, 3)).nonzero().tolist()  # rows and images that are there
        for (row, image), of_image in zip(seen, features, strict=True):
            states[row, image, : len(of_image)] = of_image
        inputs["cross_attention_states"] = states.flatten(0, 2)

    def separate_rows(self, model: nn.Module) -> None:
        """Make tokens that may see no image get nothing from cross-attention.

        Stock code gives such tokens (all of a row without image, and those before its first image)
        the same small weight on every vision token, also on those that pad the row to the number
        of images of its neighbours and to four tiles; only the feed-forward part is masked
        (transformers#39379).
        """
        for layer in model.modules():
            if isinstance(layer, MllamaCrossAttentionDecoderLayer):
                layer.register_forward_pre_hook(_note_which_tokens_see, with_kwargs=True)
                layer.cross_attn.register_forward_hook(_mask_output)


def _note_which_tokens_see(
    layer: MllamaCrossAttentionDecoderLayer, arguments: tuple, keywords: dict[str, Any]
) -> None:
    # the layer's own forward does not hand this on; a recomputed layer comes by here again
    layer.cross_attn.tokens_that_see = keywords["full_text_row_masked_out_mask"]


def _mask_output(attention: nn.Module, arguments: tuple, output: tuple) -> tuple:
    mask = attention.tokens_that_see
    return output if mask is None else (mask[:, 0] * output[0], *output[1:])


def _limit_tiles(
    image: Image.Image, processor: BaseImageProcessor, max_image_tiles: int
) -> Image.Image:
    """The picture, shrunk so that the processor lays it on at most max_image_tiles tiles.

    The processor keeps its own limit of tiles, since the base's ids of tile arrangements and its
    padding are counted with it.
    """
    tile = processor.size["height"]
    canvas = get_optimal_tiled_canvas(image.height, image.width, processor.max_image_tiles, tile)
    if canvas[0] * canvas[1] <= max_image_tiles * tile * tile:
        return image
    canvas = get_optimal_tiled_canvas(image.height, image.width, max_image_tiles, tile)
    height, width = get_image_size_fit_to_canvas(image.height, image.width, *canvas, tile)
    return image.resize((int(width), int(height)), Image.Resampling(processor.resample))


_GEMMA_LAYERS = r"model\.language_model\.layers\.\d+"
_GEMMA_ATTENTION = r"self_attn\.(q_proj|k_proj|v_proj|o_proj)"
_GEMMA_LANGUAGE = rf"{_GEMMA_LAYERS}\.({_GEMMA_ATTENTION}|mlp\.(gate_proj|up_proj|down_proj))"
_GEMMA_VISION = (
    r"model\.vision_tower\.encoder\.layers\.\d+"
    r"\.(self_attn\.(q_proj|k_proj|v_proj|out_proj)|mlp\.(fc1|fc2))"
)
_GEMMA_PARTS = MappingProxyType(
    {
        "vision": "model.vision_tower",
        "projector": "model.multi_modal_projector",
        "language": "model.language_model",
        "lm_head": "lm_head",
    }
)


class PaliGemma(Family):
    """PaliGemma 1 and 2: patches of the images before the text; images and prompt see each other.

    What follows the first answer is read causally, later prompts too, or an answer would be seen
    by the prompt before it.
    """

    model_type = "paligemma"
    parts = _GEMMA_PARTS
    presets = MappingProxyType(
        {
            "language": _GEMMA_LANGUAGE,
            "language_no_mlp": rf"{_GEMMA_LAYERS}\.{_GEMMA_ATTENTION}",
            "projector": r"model\.multi_modal_projector\.linear",
            "vision": _GEMMA_VISION,
            "all": rf"{_GEMMA_LANGUAGE}|model\.multi_modal_projector\.linear|{_GEMMA_VISION}",
        }
    )
    end_of_turn = "<eos>"
    # Source: arXiv:2407.07726, section 3.2.1: images, <bos>, prompt, line break, answer, <eos>.
    chat_template = """\
{%- for message in messages %}
  {%- set is_first = loop.first %}
  {%- if message.role == 'system' %}{{- raise_exception('it knows no system turn') }}{%- endif %}
  {%- for part in message.content if part.type == 'image' %}
    {%- if not is_first %}{{- raise_exception('its images stand in the first turn') }}{%- endif %}
    {{- '<image>' }}
  {%- endfor %}
  {{- bos_token if is_first }}
  {%- for part in message.content if part.type == 'text' %}{{- part.text }}{%- endfor %}
  {{- eos_token if message.role == 'assistant' else '\\n' }}
{%- endfor %}
"""

    def expand(self, text: str, processor: ProcessorMixin) -> str:
        """The text with one token for each patch of an image."""
        return text.replace(
            processor.image_token, processor.image_token * self.tokens_per_image(processor)
        )

    def inputs(
        self,
        processor: ProcessorMixin,
        pictures: Sequence[Sequence[Picture]],
        input_ids: Tensor,
        answers: Tensor,
    ) -> dict[str, Tensor]:
        """Which tokens are read causally.

        Returns:
            token_type_ids [B, S], 0 in image and first prompt and 1 behind them.
        """
        return {"token_type_ids": answers.long()}

    def feature_shape(self, config: PreTrainedConfig) -> tuple[int, int]:
        """P and D of a base's features: all patches."""
        vision = config.vision_config
        return (vision.image_size // vision.patch_size) ** 2, config.text_config.hidden_size


class Gemma3(Family):
    """Gemma 3 and MedGemma: an image is 256 tokens between two marks, which see each other."""

    model_type = "gemma3"
    parts = _GEMMA_PARTS
    presets = MappingProxyType(
        {
            "language": _GEMMA_LANGUAGE,
            "language_no_mlp": rf"{_GEMMA_LAYERS}\.{_GEMMA_ATTENTION}",
            "vision": _GEMMA_VISION,
            "all": rf"{_GEMMA_LANGUAGE}|{_GEMMA_VISION}",
        }
    )
    end_of_turn = "<end_of_turn>"

    def check_processor(self, processor: ProcessorMixin) -> None:
        """Refuse crops of a picture beside it, which would change its number of tokens.

        Raises:
            BaseModelError: the base asks for them.
        """
        if processor.image_processor.do_pan_and_scan:
            raise BaseModelError(
                "expected do_pan_and_scan to be off in the base's preprocessor_config.json, it is "
                "on: switch it off"
            )

    def image_token_id(self, processor: ProcessorMixin) -> int:
        """The token that stands for a feature; the processor's own name means the mark before."""
        return processor.tokenizer.image_token_id

    def never_labels(self, processor: ProcessorMixin) -> frozenset[int]:
        """Tokens that are no part of an answer, among them the marks around an image."""
        tokenizer = processor.tokenizer
        marks = {tokenizer.boi_token_id, tokenizer.eoi_token_id}
        return super().never_labels(processor) | marks

    def expand(self, text: str, processor: ProcessorMixin) -> str:
        """The text with an image's tokens and marks in the place of its first mark."""
        return text.replace(processor.boi_token, processor.full_image_sequence)

    def inputs(
        self,
        processor: ProcessorMixin,
        pictures: Sequence[Sequence[Picture]],
        input_ids: Tensor,
        answers: Tensor,
    ) -> dict[str, Tensor]:
        """Which tokens stand for images.

        Returns:
            token_type_ids [B, S], 1 for the tokens of an image.
        """
        return {"token_type_ids": (input_ids == self.image_token_id(processor)).long()}

    def feature_shape(self, config: PreTrainedConfig) -> tuple[int, int]:
        """P and D of a base's features: pooled patches."""
        return config.mm_tokens_per_image, config.text_config.hidden_size


MLLAMA = Mllama()
PALIGEMMA = PaliGemma()
GEMMA3 = Gemma3()

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {family.model_type: family for family in (MLLAMA, PALIGEMMA, GEMMA3)}
)


def family_of(model_type: str | None) -> Family:
    """The family of a base model.

    Raises:
        BaseModelError: medft does not know this architecture.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in ("siglip", "siglip2"):
        raise BaseModelError(
            f"expected a decoder, model.base is a {model_type}: train it with siglip_lora.py"
        )
    raise BaseModelError(
        f"expected a base of a known family ({', '.join(FAMILIES)}), model.base has model_type "
        f"{model_type!r}: choose another base"
    )
