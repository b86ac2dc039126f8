"""What differs between the families of image-text decoders, one file each."""

from collections.abc import Mapping
from types import MappingProxyType

from medft.decoder.families.base import Family
from medft.decoder.families.gemma3 import GEMMA3
from medft.decoder.families.mllama import MLLAMA
from medft.decoder.families.paligemma import PALIGEMMA
from medft.errors import BaseModelError

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {family.model_type: family for family in (MLLAMA, PALIGEMMA, GEMMA3)}
)


def family_of(model_type: str | None) -> Family:
    """The family of a base model.

    Raises:
        BaseModelError: medft does not know this architecture.
    """
    if model_type is not None and model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in ("siglip", "siglip2"):
        raise BaseModelError(
            f"expected a decoder, model.base is a {model_type}: train it with siglip_lora.py"
        )
    raise BaseModelError(
        f"expected a base of a known family ({', '.join(FAMILIES)}), model.base has model_type "
        f"{model_type!r}: choose another base"
    )
