"""Memory that ran out in a training: how it shows, and which keys of the recipe take less."""

import errno
import re
import resource
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
import torch
from transformers import TrainingArguments

from medft.config.recipe import DecoderRecipe, Recipe, SiglipRecipe
from medft.full_disk import causes

_OF_DEVICE = re.compile(
    "(CUDA|HIP|XPU|NPU|MPS backend).*out of memory|(CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_ALLOC"
)
_OF_HOST = re.compile(r"can't allocate memory|Cannot allocate memory|std::bad_alloc|bad allocation")

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Bytes that a container may take, or `max`."""

_ADVISED = 3

_SHORTER = 0.9
"""Part of the longest row's tokens at which a smaller max_length is worth its loss."""

Where = Literal["loading", "step", "evaluation", "rows"]
"""What a training was at when memory ran out: the base, a step, an evaluation, a batch's rows."""


class Change(NamedTuple):
    """Keys of a recipe that take less memory with other values."""

    keys: str
    """As on the command line."""

    loss: str
    """What is lost by it."""


def memory_that_ran_out(error: BaseException) -> str | None:
    """The memory that an error is about, with its size; None if the error has another reason."""
    for cause in causes(error):
        text = str(cause)
        if isinstance(cause, torch.OutOfMemoryError) or _OF_DEVICE.search(text):
            return _device()
        is_own = type(cause).__module__.startswith("medft.")  # it may quote a row
        if isinstance(cause, MemoryError) or getattr(cause, "errno", None) == errno.ENOMEM:
            return _host()
        if isinstance(cause, RuntimeError) and not is_own and _OF_HOST.search(text):
            return _host()
    return None


def _device() -> str:
    if not torch.cuda.is_available():
        return "the device"
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"the GPU ({properties.name}, {properties.total_memory / 2**30:.1f} GiB)"


def _host() -> str:
    limits = [psutil.virtual_memory().total]
    if (own := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        limits.append(own)
    if _CGROUP_LIMIT.is_file() and (container := _CGROUP_LIMIT.read_text().strip()).isdecimal():
        limits.append(int(container))
    return f"the host ({min(limits) / 2**30:.1f} GiB for this process at most)"


def changes_that_help(
    recipe: Recipe, arguments: TrainingArguments, data: dict[str, Any], where: Where
) -> list[Change]:
    """At most three changes of a recipe that take less memory, in the order of what is lost.

    Args:
        recipe: as resolved.
        arguments: the trainer's.
        data: counts of the rows, as in run.json.
        where: memory ran out.
    """
    of_both = _of_weights(recipe), _of_rows(recipe, data), _of_adapter(recipe)
    micro_batch = _of_micro_batch(recipe, arguments)
    parts = {
        "loading": [_of_loading(recipe)],
        "step": [_of_checkpointing(arguments), micro_batch, *of_both],
        "evaluation": [_of_evaluation(arguments), *of_both],
        "rows": [_of_workers(arguments), micro_batch, _of_rows(recipe, data)],
    }
    smaller_base = Change("another model.base", "a smaller model")
    return list(islice(chain(*parts[where], [smaller_base]), _ADVISED))


def _of_loading(recipe: Recipe) -> Iterator[Change]:
    """What loading takes; that of SigLIP is in float32 whatever its precision is later."""
    return _of_weights(recipe) if isinstance(recipe, DecoderRecipe) else iter(())


def _of_checkpointing(arguments: TrainingArguments) -> Iterator[Change]:
    if not arguments.gradient_checkpointing:
        yield Change("train.gradient_checkpointing=true", "slower, the same result")


def _of_micro_batch(recipe: Recipe, arguments: TrainingArguments) -> Iterator[Change]:
    rows = arguments.per_device_train_batch_size
    accumulation = arguments.gradient_accumulation_steps
    if rows == 1:
        return
    fewer = next(part for part in range(rows // 2, 0, -1) if rows % part == 0)
    keys = (
        f"train.per_device_train_batch_size={fewer} "
        f"train.gradient_accumulation_steps={accumulation * rows // fewer}"
    )
    if isinstance(recipe, SiglipRecipe) and not recipe.contrastive.exact_batch:
        yield Change(f"{keys} contrastive.exact_batch=true", "slower, no pair is lost")
    else:
        yield Change(keys, "slower, the same effective batch")


def _of_evaluation(arguments: TrainingArguments) -> Iterator[Change]:
    rows = arguments.per_device_eval_batch_size
    if rows > 1:
        yield Change(f"train.per_device_eval_batch_size={rows // 2}", "slower, the same result")


def _of_workers(arguments: TrainingArguments) -> Iterator[Change]:
    workers = arguments.dataloader_num_workers
    if workers == 1:  # without them there is nothing to be prefetched
        keys = "train.dataloader_num_workers=0 train.dataloader_prefetch_factor=null"
        yield Change(keys, "slower, the same result")
    elif workers:
        yield Change(f"train.dataloader_num_workers={workers // 2}", "slower, the same result")
    if workers > 1 and arguments.dataloader_prefetch_factor != 1:
        yield Change("train.dataloader_prefetch_factor=1", "slower, the same result")


def _of_weights(recipe: Recipe) -> Iterator[Change]:
    lora = recipe.lora
    if lora is None:
        yield Change("lora='{r: 16, alpha: 32}'", "an adapter is trained, not every weight")
        return
    if recipe.model.dtype == "float32":
        yield Change("model.dtype=bfloat16", "rounded weights of the base")
    if isinstance(recipe, DecoderRecipe):
        if recipe.quantization is None and lora.init_lora_weights != "orthogonal":
            yield Change("quantization='{bits: 4}'", "4-bit weights of the base")
        elif recipe.quantization and not recipe.quantization.double_quant:
            yield Change("quantization.double_quant=true", "rounded constants of 4-bit weights")


def _of_rows(recipe: Recipe, data: dict[str, Any]) -> Iterator[Change]:
    if isinstance(recipe, SiglipRecipe):
        yield Change(f"data.image_size={recipe.data.image_size * 3 // 4}", "coarser images")
    if not isinstance(recipe, DecoderRecipe):
        return
    lengths = data["train"]["tokens_a_row"]
    longest = min(lengths["longest"], recipe.data.max_length)
    if lengths["p95"] <= _SHORTER * longest:
        yield Change(f"data.max_length={lengths['p95']}", "the ends of the longest answers")
    tiles = recipe.data.max_image_tiles
    if recipe.model.cross_attention_fix and tiles > 1:  # else all are padded to the base's number
        yield Change(f"data.max_image_tiles={tiles // 2}", "coarser images")


def _of_adapter(recipe: Recipe) -> Iterator[Change]:
    lora = recipe.lora
    if lora and lora.r > 1 and not (lora.init_from or lora.init_lora_weights == "orthogonal"):
        keys = f"lora.r={lora.r // 2} lora.alpha={max(lora.alpha // 2, 1)}"
        yield Change(keys, "a smaller adapter")
