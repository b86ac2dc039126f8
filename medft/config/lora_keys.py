"""Keys of the section `lora` that are not medft's own but fields of peft.LoraConfig."""

import functools
from collections.abc import Collection
from typing import get_type_hints

from pydantic import TypeAdapter

from medft.config.strict_yaml import ErrorDetails, errors_of

INITIAL_WEIGHTS = ("gaussian", "orthogonal", "pissa", "olora")
"""Values of lora.init_lora_weights beside true and false. PEFT draws the base of pissa_niter_N anew
at each load, and eva, lora_ga and corda want a pass over the data that nobody makes here."""

_OWNED = {
    *("lora_alpha", "lora_dropout", "target_modules", "task_type", "peft_type"),
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
}
"""Fields of peft.LoraConfig that medft sets, or has under names of its own."""


def lora_errors(lora: object, own: Collection[str]) -> list[ErrorDetails]:
    """Errors in the further keys of `lora`: no field of peft.LoraConfig, or of another type.

    Args:
        lora: the section as it was written.
        own: keys that medft defines.
    """
    from peft import LoraConfig

    if not isinstance(lora, dict):
        return []
    hints = {**get_type_hints(LoraConfig), "init_lora_weights": bool | str}
    errors = []
    for key in lora.keys() - own:
        if key not in hints or key in _OWNED:
            errors.append({"loc": ("lora", key), "type": "extra_forbidden"})
            continue
        adapter = TypeAdapter(hints[key])
        check = functools.partial(adapter.validate_python, lora[key], strict=True)
        errors += errors_of(check, "lora", key)
    return errors
