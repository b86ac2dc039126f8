"""Gemma 3 and MedGemma.

Shape letters: see `medft.decoder.families.base`.
"""

from collections.abc import Sequence
from types import MappingProxyType

from torch import Tensor
from transformers import PreTrainedConfig, ProcessorMixin

from medft.decoder.families.base import Family, ImageInputs
from medft.decoder.families.gemma_names import (
    GEMMA_ATTENTION,
    GEMMA_LANGUAGE,
    GEMMA_LAYERS,
    GEMMA_PARTS,
    GEMMA_VISION,
)
from medft.errors import BaseModelError


class Gemma3(Family):
    """Gemma 3 and MedGemma: an image is 256 tokens, which see each other, between two markers."""

    model_type = "gemma3"
    parts = GEMMA_PARTS
    presets = MappingProxyType(
        {
            "language": GEMMA_LANGUAGE,
            "language_no_mlp": rf"{GEMMA_LAYERS}\.{GEMMA_ATTENTION}",
            "vision": GEMMA_VISION,
            "all": rf"{GEMMA_LANGUAGE}|{GEMMA_VISION}",
        }
    )
    end_of_turn = "<end_of_turn>"
    overflows_float16 = True

    def check_processor(self, processor: ProcessorMixin) -> None:
        """Refuse pan-and-scan crops, which would change the number of tokens per image.

        Raises:
            BaseModelError: do_pan_and_scan is on.
        """
        if processor.image_processor.do_pan_and_scan:
            raise BaseModelError(
                "expected do_pan_and_scan to be off in the base's preprocessor_config.json, it is "
                "on: switch it off"
            )

    def image_token_id(self, processor: ProcessorMixin) -> int:
        """Id of the token for one feature; the processor's image_token_id is the marker before."""
        return processor.tokenizer.image_token_id

    def non_answer_token_ids(self, processor: ProcessorMixin) -> frozenset[int]:
        """Ids of tokens that never belong to an answer, the markers around an image included."""
        tokenizer = processor.tokenizer
        marks = {tokenizer.boi_token_id, tokenizer.eoi_token_id}
        return super().non_answer_token_ids(processor) | marks

    def expand(self, text: str, processor: ProcessorMixin) -> str:
        """The text, each image's first marker replaced by its full token sequence."""
        return text.replace(processor.boi_token, processor.full_image_sequence)

    def attention_inputs(
        self,
        processor: ProcessorMixin,
        images: Sequence[Sequence[ImageInputs]],
        input_ids: Tensor,
        answers: Tensor,
    ) -> dict[str, Tensor]:
        """Model inputs that mark the tokens of images.

        Returns:
            token_type_ids [B, S], 1 for the tokens of an image.
        """
        return {"token_type_ids": (input_ids == self.image_token_id(processor)).long()}

    def feature_shape(self, config: PreTrainedConfig) -> tuple[int, int]:
        """P and D of a base's features: pooled patches."""
        return config.mm_tokens_per_image, config.text_config.hidden_size


GEMMA3 = Gemma3()
