"""What differs between a recorded run and the present: defaults of libraries."""

import re
from collections.abc import Callable, Iterator
from typing import Any

from peft import LoraConfig
from transformers import BitsAndBytesConfig

from medft.config.recipe import DecoderRecipe, Recipe, SiglipRecipe
from medft.decoder.trainer import decoder_arguments
from medft.models.resolved import (
    Part,
    Recorded,
    changed_fields,
    plain,
    public_fields,
    recorded_fields,
    resolved_arguments,
)
from medft.models.run_record import leaves
from medft.siglip.trainer import siglip_arguments


def default_changes(recipe: Recipe, recorded: Recorded) -> tuple[list[str], list[str]]:
    """Sentences on fields that the libraries would fill in otherwise now, and on fields they add.

    Raises:
        MedftError: as from `_defaults_now`.
    """
    applied, added = [], []
    for part, name, fields, is_default in _defaults_now(recipe, recorded):
        known = getattr(recorded.resolved, part) or {}
        for field, was, value in changed_fields(part, known, fields):
            if not is_default(field):
                continue
            if field in known:
                applied.append(
                    f"{name}.{field} would be {value!r} now and was {was!r}, which is used"
                )
            else:
                added.append(f"{name}.{field} is new in the library, which sets {value!r}")
    return applied, added


def _defaults_now(
    recipe: Recipe, recorded: Recorded
) -> Iterator[tuple[Part, str, dict[str, Any], Callable[[str], bool]]]:
    """Of each part of a record: its name, class, fields as medft would set them now, and which.

    Raises:
        RunError: a recorded field cannot be applied.
        RecipeError: the library refuses a recorded value.
    """
    options: dict[str, Any] = {"dtype": recipe.model.dtype, "use_cpu": True}
    make: Any = siglip_arguments if isinstance(recipe, SiglipRecipe) else decoder_arguments
    make(recipe.train, recorded=recorded, **options)
    arguments = make(recipe.train, **options)
    yield "arguments", type(arguments).__name__, resolved_arguments(arguments), lambda name: True
    if recipe.lora:
        recorded_fields(LoraConfig, recorded, "lora")
        written = {"r", "lora_alpha", "lora_dropout", "target_modules", "task_type"}
        written |= {key for key, value in recipe.lora.model_dump().items() if value is not None}
        yield "lora", "LoraConfig", plain(LoraConfig()), lambda name: name not in written
    if isinstance(recipe, DecoderRecipe) and recipe.quantization:
        recorded_fields(BitsAndBytesConfig, recorded, "quantization")
        fields = public_fields(plain(BitsAndBytesConfig()))
        own = re.compile("load_in_4bit|bnb_4bit_(?!quant_storage).*|llm_int8_skip_modules")
        yield "quantization", "BitsAndBytesConfig", fields, lambda name: not own.fullmatch(name)


def first_change(then: Any, now: Any) -> str:
    """The first value that changed in a part of the record, as text."""
    first, second = dict(leaves(then)), dict(leaves(now))
    name = next(key for key in {**first, **second} if first.get(key) != second.get(key))
    return f"{name or 'it'} was {first.get(name)} and is {second.get(name)}"
