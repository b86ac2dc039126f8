"""What differs between the families of image-text decoders, in one table.

A family is chosen by `model_type` in the base's config.json. Code elsewhere asks the family and
never tests for a name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer

from medft.errors import BaseModelError


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Names and rules of one architecture, as transformers 5 builds it."""

    model_type: str
    """As in config.json."""

    parts: Mapping[str, str]
    """Prefixes of module names, by part: vision, projector, language, lm_head."""

    presets: Mapping[str, str]
    """Regular expressions over whole module names, by the name of a `lora.targets` preset."""

    template_arguments: Mapping[str, Any]
    """Values that the chat template would otherwise take from the clock."""

    fix_cross_attention: Callable[[nn.Module], None] | None
    """Makes a loaded model's rows independent of their neighbours, where the stock code mixes them;
    None for a family without that flaw."""


def _mask_output_of_cross_attention(model: nn.Module) -> None:
    """Make Mllama's tokens that may see no image get nothing from cross-attention.

    Stock code gives such tokens (all of a row without image, and those before its first image) the
    same small weight on every vision token, also on those that pad the row to the number of images
    of its neighbours and to four tiles; only the feed-forward part is masked (transformers#39379).
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


_MLLAMA_LAYERS = r"model\.language_model\.layers\.\d+"
_MLLAMA_ATTENTION = r"(self_attn|cross_attn)\.(q_proj|k_proj|v_proj|o_proj)"
_MLLAMA_LANGUAGE = rf"{_MLLAMA_LAYERS}\.({_MLLAMA_ATTENTION}|mlp\.(gate_proj|up_proj|down_proj))"
_MLLAMA_PROJECTOR = r"model\.multi_modal_projector"
_MLLAMA_VISION = (
    r"model\.vision_model\.(transformer|global_transformer)\.layers\.\d+"
    r"\.(self_attn\.(q_proj|k_proj|v_proj|o_proj)|mlp\.(fc1|fc2))"
)

MLLAMA = Family(
    model_type="mllama",
    parts=MappingProxyType(
        {
            "vision": "model.vision_model",
            "projector": "model.multi_modal_projector",
            "language": "model.language_model",
            "lm_head": "lm_head",
        }
    ),
    presets=MappingProxyType(
        {
            "language": _MLLAMA_LANGUAGE,
            "language_no_mlp": rf"{_MLLAMA_LAYERS}\.{_MLLAMA_ATTENTION}",
            "cross_attention": rf"{_MLLAMA_LAYERS}\.cross_attn\.(q_proj|k_proj|v_proj|o_proj)",
            "projector": _MLLAMA_PROJECTOR,
            "vision": _MLLAMA_VISION,
            "all": rf"{_MLLAMA_LANGUAGE}|{_MLLAMA_PROJECTOR}|{_MLLAMA_VISION}",
        }
    ),
    # The release writes today's date into conversations without image; it is frozen to the
    # template's own fallback, so that a row has the same tokens tomorrow.
    template_arguments=MappingProxyType({"date_string": "26 Jul 2024"}),
    fix_cross_attention=_mask_output_of_cross_attention,
)

FAMILIES: Mapping[str, Family] = MappingProxyType({MLLAMA.model_type: MLLAMA})


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
