"""Validation of the keys of section `lora` that are fields of peft.LoraConfig, not medft's own."""

import functools
from collections.abc import Collection
from typing import get_type_hints

from pydantic import TypeAdapter

from medft.config.strict_yaml import ErrorDetails, errors_of

INITIAL_WEIGHTS = ("gaussian", "orthogonal", "pissa", "olora")
"""Accepted values of lora.init_lora_weights besides true and false. PEFT redraws the base of
pissa_niter_N at each load; eva, lora_ga and corda need a pass over the data, which medft lacks."""

_OWNED = {
    *("lora_alpha", "lora_dropout", "target_modules", "task_type", "peft_type"),
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
    *("megatron_config", "megatron_core"),
    *("fan_in_fan_out", "use_qalora", "qalora_group_size", "alora_invocation_tokens"),
}
"""Fields of peft.LoraConfig that medft sets or has under its own names, that name code, or that
belong to layers and inputs that no base of medft has."""


def lora_errors(lora: object, own: Collection[str]) -> list[ErrorDetails]:
    """Errors in the extra keys of `lora`: not a field of peft.LoraConfig, or a wrong type.

    Args:
        lora: the section as written.
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
