"""The recipe's `train` and `model.dtype` as the library's training arguments, in one precision."""

import os
import sys
import warnings
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments

from medft.errors import RecipeError

Arguments = TypeVar("Arguments", bound=TrainingArguments)

_MIXED_PRECISION = {"bfloat16": "bf16", "float16": "fp16", "float32": "no"}


def training_arguments(
    arguments_class: type[Arguments], train: dict[str, Any], *, dtype: str, **owned: Any
) -> Arguments:
    """The arguments of a trainer.

    Args:
        arguments_class: SFTConfig or TrainingArguments.
        train: the resolved recipe's section.
        dtype: `model.dtype`; bfloat16 and float16 run under autocast, float16 with loss scaling.
        **owned: fields that medft sets and a recipe may not.

    Raises:
        RecipeError: the library refuses a value, this machine lacks the precision, or the
            launcher was told another one.
    """
    mixed = _MIXED_PRECISION[dtype]
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", mixed):
        raise RecipeError(
            f"expected the launcher's mixed_precision to be absent, it is {launched} and "
            f"model.dtype is {dtype}: remove mixed_precision from accelerate's configuration"
        )
    if dtype == "float16" and not torch.cuda.is_available():
        raise RecipeError(
            "expected a GPU for model.dtype float16, whose gradients need loss scaling, found "
            "none: write bfloat16 or float32"
        )
    machine = {
        "disable_tqdm": not sys.stderr.isatty(),
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.accelerator.is_available(),
    }
    fields = {**machine, **train}
    fields.pop("resume_from_checkpoint", None)
    # the name that every supported version reads; newer ones announce another
    warnings.filterwarnings("ignore", message="`gradient_checkpointing", category=FutureWarning)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing", category=FutureWarning)
    try:
        return arguments_class(
            **fields,
            bf16=mixed == "bf16",
            fp16=mixed == "fp16",
            remove_unused_columns=False,
            **owned,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(
            f"expected values that the trainer accepts in train, it says: "
            f"{' '.join(str(error).split())}"
        ) from error
