"""PaliGemma 1 and 2.

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


class PaliGemma(Family):
    """PaliGemma 1 and 2: patches of the images before the text; images and prompt see each other.

    Everything from the first answer on is causal, later prompts included; otherwise the prompt
    before an answer would see it.
    """

    model_type = "paligemma"
    parts = GEMMA_PARTS
    presets = MappingProxyType(
        {
            "language": GEMMA_LANGUAGE,
            "language_no_mlp": rf"{GEMMA_LAYERS}\.{GEMMA_ATTENTION}",
            "projector": r"model\.multi_modal_projector\.linear",
            "vision": GEMMA_VISION,
            "all": rf"{GEMMA_LANGUAGE}|model\.multi_modal_projector\.linear|{GEMMA_VISION}",
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
        """The text with one image token per patch."""
        return text.replace(
            processor.image_token, processor.image_token * self.tokens_per_image(processor)
        )

    def attention_inputs(
        self,
        processor: ProcessorMixin,
        images: Sequence[Sequence[ImageInputs]],
        input_ids: Tensor,
        answers: Tensor,
    ) -> dict[str, Tensor]:
        """Model inputs that mark the tokens with causal attention.

        Returns:
            token_type_ids [B, S], 0 in image and first prompt and 1 after them.
        """
        return {"token_type_ids": answers.long()}

    def feature_shape(self, config: PreTrainedConfig) -> tuple[int, int]:
        """P and D of a base's features: all patches."""
        vision = config.vision_config
        return (vision.image_size // vision.patch_size) ** 2, config.text_config.hidden_size


PALIGEMMA = PaliGemma()
