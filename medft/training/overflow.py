"""Activations near the largest number of float16, found in the first step of a run."""

import functools
import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from medft.compat import tensors_in
from medft.errors import RunError

logger = logging.getLogger(__name__)

LIMIT = torch.finfo(torch.float16).max / 2
"""Largest activation of a first step: other rows and trained weights may double it, and beyond
65,504 float16 has infinity only."""


class OverflowCallback(TrainerCallback):
    """Raises before the first optimizer step if an activation comes near the end of float16.

    Every output in the computing precision of every module is measured, on every process, in the
    first step only. An infinite one would give a loss that is NaN, or, behind a normalization, one
    that is wrong and finite.
    """

    def __init__(self, dtype: torch.dtype = torch.float16) -> None:
        """Create the callback; `dtype` is the precision of the outputs that are measured."""
        self._dtype = dtype
        self._largest: dict[str, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Register a hook on each module."""
        for name, module in model.named_modules():
            measure = functools.partial(self._measure, name.removeprefix("base_model.model."))
            self._handles.append(module.register_forward_hook(measure))

    def _measure(self, name: str, module: nn.Module, inputs: Any, outputs: Any) -> None:
        for tensor in tensors_in(outputs):
            if tensor.dtype == self._dtype and tensor.numel():
                found = tensor.detach().abs().amax().float().nan_to_num(nan=torch.inf)
                known = self._largest.get(name, found)
                self._largest[name] = torch.maximum(found, known.to(found.device))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the hooks and judge what they measured."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        values = {name: float(value) for name, value in self._largest.items()}
        most = max(values, key=lambda name: values[name], default="no module")
        where = next((name for name in values if values[name] > LIMIT), most)
        own = torch.tensor(values.get(where, 0.0), device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(own, op=torch.distributed.ReduceOp.MAX)
        largest = float(own)
        logger.info("largest activation of the first step: %.5g (%s)", largest, where)
        if largest > LIMIT:
            raise RunError(
                f"expected activations below {LIMIT:,.0f} in the first step, half of "
                f"what float16 holds, got {largest:,.0f} ({where}): write model.dtype: bfloat16 "
                f"or float32"
            )
