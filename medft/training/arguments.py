"""TrainingArguments from the recipe's `train` section, in the one precision of `model.dtype`."""

import logging
import math
import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from accelerate.utils import parse_flag_from_env
from transformers import (
    Trainer,
    TrainingArguments,
    get_scheduler,
)

from medft.compat import reporting_integrations
from medft.config.train_keys import TrainSection
from medft.errors import RecipeError
from medft.models.resolved import Recorded, recorded_fields
from medft.training.deepspeed import start_deepspeed
from medft.training.launched import check_environment, find_launch

logger = logging.getLogger(__name__)

Arguments = TypeVar("Arguments", bound=TrainingArguments)

_MIXED_PRECISION = {"bfloat16": "bf16", "float16": "fp16", "float32": "no"}


def training_arguments(
    arguments_class: type[Arguments],
    train: TrainSection,
    *,
    dtype: str,
    metrics: Mapping[str, bool],
    recorded: Recorded | None = None,
    **owned: Any,
) -> Arguments:
    """The training arguments of a run, accepted by the library and this machine.

    Args:
        arguments_class: SFTConfig or TrainingArguments.
        train: the resolved recipe's section.
        dtype: `model.dtype`; bfloat16 and float16 run under autocast, float16 with loss scaling.
        metrics: names that metric_for_best_model may take, and whether higher is better.
        recorded: the record of the run that is repeated, whose fields take the place of all others.
        **owned: fields that medft sets and a recipe may not.

    Raises:
        RunError: the library lacks a recorded field.
        RecipeError: the library rejects a value, machine or launcher lack the precision, the
            launcher sets another one or starts other processes than it was asked for, or the
            process sees several GPUs, which Trainer would use at once.
    """
    check_environment()
    mixed = _mixed_precision(dtype)
    if (train.max_steps or -1) > 0 and train.num_train_epochs is not None:
        logger.info("train.max_steps ends the run, train.num_train_epochs is not used")
    if train.learning_rate == 0:
        logger.warning("train.learning_rate is 0, so that no weight will change")
    fields = {
        "disable_tqdm": not sys.stderr.isatty(),
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.accelerator.is_available(),
        **train.library_fields(),
        "bf16": mixed == "bf16",
        "fp16": mixed == "fp16",
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "restore_callback_states_from_checkpoint": True,
        **owned,
    }
    if "metric_for_best_model" in fields:
        name = fields["metric_for_best_model"].removeprefix("eval_")
        if name not in metrics:
            raise RecipeError(
                f"expected train.metric_for_best_model to be one of "
                f"{', '.join(f'eval_{known}' for known in metrics)}, got {name!r}: correct it"
            )
        fields["greater_is_better"] = metrics[name]
    if recorded is not None:
        fields |= recorded_fields(arguments_class, recorded, "arguments")
        fields["use_cpu"] |= recorded.resolved.arguments["use_cpu"]
    # every supported version reads these names; newer ones deprecate them
    warnings.filterwarnings("ignore", message="`gradient_checkpointing", category=FutureWarning)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing", category=FutureWarning)
    try:
        arguments = arguments_class(**fields)
        _try_out(arguments)
    except (ValueError, TypeError, KeyError, ImportError, AttributeError) as error:
        raise RecipeError(
            f"expected values that the trainer accepts in train, it says: "
            f"{' '.join(str(error).split())}"
        ) from error
    if arguments.n_gpu > 1:
        raise RecipeError(
            f"expected one GPU in a process, this one sees {arguments.n_gpu} and Trainer would "
            f"spread every batch over them: start with --config_file accelerate_configs/ddp.yaml, "
            f"or set CUDA_VISIBLE_DEVICES=0"
        )
    find_launch(arguments)
    start_deepspeed()
    return arguments


def _mixed_precision(dtype: str) -> str:
    """Accelerate's name for a dtype.

    Raises:
        RecipeError: the launcher sets another, or does not train in this one.
    """
    mixed = _MIXED_PRECISION[dtype]
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", mixed):
        raise RecipeError(
            f"expected the launcher's mixed_precision to be absent, it is {launched} and "
            f"model.dtype is {dtype}: remove mixed_precision from accelerate's configuration"
        )
    if dtype == "float16" and parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise RecipeError(
            "expected model.dtype bfloat16 or float32 under DeepSpeed, which would round what is "
            "trained to float16: write one of them, or use accelerate_configs/ddp.yaml"
        )
    if dtype == "float16" and not torch.cuda.is_available():
        raise RecipeError(
            "expected a GPU for model.dtype float16, whose gradients need loss scaling, found "
            "none: write bfloat16 or float32"
        )
    return mixed


def _try_out(arguments: TrainingArguments) -> None:
    """Check optimizer, scheduler and reporters, which Trainer makes after the model is loaded."""
    Trainer.get_optimizer_cls_and_kwargs(arguments)
    get_scheduler(
        arguments.lr_scheduler_type,
        torch.optim.SGD([torch.zeros(1)], lr=1.0),
        num_warmup_steps=1,
        num_training_steps=9,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    missing = set(arguments.report_to) - set(reporting_integrations())
    if missing:
        raise ImportError(f"report_to names {', '.join(sorted(missing))}, which is not installed")


def batch_arithmetic(batches: int, arguments: TrainingArguments) -> dict[str, int]:
    """Batch sizes and step counts for so many batches of each process, as Trainer computes them.

    Returns:
        per_device, accumulation, world, effective (rows per optimizer step), steps_per_epoch,
        steps and warmup_steps.

    Raises:
        RecipeError: the run ends before the learning rate has risen, or before an evaluation.
    """
    per_device = arguments.per_device_train_batch_size
    accumulation = arguments.gradient_accumulation_steps
    global_batch_size = per_device * arguments.world_size
    steps_per_epoch = math.ceil(batches / accumulation)
    steps = arguments.max_steps
    if steps <= 0:
        steps = math.ceil(arguments.num_train_epochs * steps_per_epoch)
    warmup_steps = arguments.get_warmup_steps(steps)
    if warmup_steps > steps:
        raise RecipeError(
            f"expected train.warmup_steps of at most {steps}, the steps of the run, got "
            f"{warmup_steps}: lower it, or write a fraction such as 0.1"
        )
    counts_steps = arguments.eval_strategy == "steps"
    length = steps if counts_steps else steps / steps_per_epoch
    if arguments.eval_strategy != "no" and arguments.eval_delay > length:
        raise RecipeError(
            f"expected train.eval_delay of at most {length:g}, the "
            f"{'steps' if counts_steps else 'epochs'} of the run, got {arguments.eval_delay:g}, so "
            f"that nothing would be evaluated: lower it"
        )
    return {
        "per_device": per_device,
        "accumulation": accumulation,
        "world": arguments.world_size,
        "effective": global_batch_size * accumulation,
        "steps_per_epoch": steps_per_epoch,
        "steps": steps,
        "warmup_steps": warmup_steps,
    }
