"""What medft adds to Trainer's loop: numbers that are none stop it, SIGTERM ends it in order.

A step knows the ids of its rows, and the log how fast rows come and how long they are waited for.
"""

import functools
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from medft.errors import RunError
from medft.provenance import peak_memory

ROW_IDS = "row_ids"
"""Key of a batch's ids, which no model sees."""

SHOWN_ROWS = 8
"""Ids of a broken step's rows that are named at the most."""


class MeasuredBatches(Trainer):
    """A trainer whose collator puts ids beside its tensors, under ROW_IDS."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.row_ids: list[str] = []
        self._since: float | None = None  # training has not begun
        self._restart_measuring()

    def _restart_measuring(self) -> None:
        self._rows_taken = self._tokens_taken = 0
        self._seconds_waited = 0.0

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | int | None]:
        """The batches of a step, their ids kept in `row_ids`."""
        started = time.perf_counter()
        self._since = self._since or started
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._seconds_waited += time.perf_counter() - started
        self.row_ids = [name for batch in batches for name in batch.pop(ROW_IDS)]
        self._rows_taken += len(self.row_ids)
        self._tokens_taken += sum(int((b["labels"] >= 0).sum()) for b in batches if "labels" in b)
        return batches, items

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The figures of an evaluation, whose time is not counted as training."""
        started = time.perf_counter()
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            if self._since is not None:
                self._since += time.perf_counter() - started

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add this process's rows and supervised tokens a second, waiting and memory."""
        if "loss" in logs and self._since is not None:
            now = time.perf_counter()
            seconds = now - self._since
            logs["rows_per_second"] = round(self._rows_taken / seconds, 3)
            if self._tokens_taken:
                logs["supervised_tokens_per_second"] = round(self._tokens_taken / seconds, 3)
            logs["data_wait"] = round(self._seconds_waited / seconds, 4)
            peak = peak_memory()
            logs["peak_memory_gib"] = round(peak.get("device", peak["host"]) / 2**30, 3)
            self._since = now
            self._restart_measuring()
        super().log(logs, start_time)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return super()._prepare_inputs({k: v for k, v in inputs.items() if k != ROW_IDS})


class NumberGuard(TrainerCallback):
    """Stops a run before a gradient, a weight or a loss that is no number can be kept.

    A step's gradients are looked at before the optimizer uses them and its weights afterwards, so
    that no checkpoint holds what is broken. Under loss scaling an infinite gradient only skips the
    step; DeepSpeed keeps gradients to itself, and only the weights are looked at.
    """

    def __init__(self, row_ids: Callable[[], list[str]]) -> None:
        """Make the guard; `row_ids` gives the ids of the step's rows."""
        self._row_ids = row_ids

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module,
        **kwargs: Any,
    ) -> None:
        """Look at the gradients before they are used."""
        if not args.fp16:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            self._check(gradients, "gradient", state.global_step + 1)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module,
        **kwargs: Any,
    ) -> None:
        """Look at the weights that the step left."""
        trained = [p.data for p in model.parameters() if p.requires_grad]
        self._check(trained, "trained weight", state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Look at what is logged."""
        values = [torch.tensor(logs[name]) for name in ("loss", "eval_loss") if name in logs]
        self._check(values, "loss", state.global_step)

    def _check(self, tensors: list[torch.Tensor], name: str, step: int) -> None:
        if tensors and not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
            ids = self._row_ids()
            more = f" and {len(ids) - SHOWN_ROWS} more" if len(ids) > SHOWN_ROWS else ""
            raise RunError(
                f"expected every {name} of step {step} to be a number, some are not after the rows "
                f"{', '.join(ids[:SHOWN_ROWS])}{more}: look at them, lower train.learning_rate or "
                f"use model.dtype: float32, and resume from the last checkpoint"
            )


class GradientWitness(TrainerCallback):
    """Stops a run after its first whole epoch where a tensor of the adapter got no gradient in it.

    Such a tensor sits on a layer that no row runs, or whose adapter is never called; the adapter
    would hold it untrained. A part of an epoch tells nothing, its rows may be of one kind.
    """

    def __init__(self) -> None:
        self._is_whole = False
        self._without: set[str] = set()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module,
        **kwargs: Any,
    ) -> None:
        """Wait for the first gradient of each tensor."""
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" in name:
                self._without.add(name)
                seen = functools.partial(self._seen, name)
                self._handles.append(parameter.register_hook(seen))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note whether the epoch begins here or goes on from a checkpoint."""
        self._is_whole = float(state.epoch or 0).is_integer()

    def _seen(self, name: str, gradient: torch.Tensor) -> None:
        self._without.discard(name)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Look which tensors are still without; Trainer comes here in mid-epoch when it stops."""
        if not (self._is_whole and float(state.epoch).is_integer()):
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._without:
            first = min(self._without).removeprefix("base_model.model.")
            raise RunError(
                f"expected a gradient for every tensor of the adapter, {len(self._without)} got "
                f"none in an epoch, first {first}: no row runs its layer, leave it out of "
                f"lora.targets"
            )


class EpochTeller(TrainerCallback):
    """Tells the number of an epoch, also to what Accelerate's wrappers hide from Trainer."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self.tell = tell

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the epoch, counted from 0, that begins or goes on."""
        self.tell(int(state.epoch or 0))


class HistoryWriter(TrainerCallback):
    """Writes the history at every save."""

    def __init__(self, write: Callable[[TrainerState], None]) -> None:
        self.write = write

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Write the history beside the checkpoint."""
        self.write(state)


class SigtermStopper(TrainerCallback):
    """Saves a checkpoint and ends training after the step in which SIGTERM came."""

    def __init__(self) -> None:
        self.terminated = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM while the block runs."""
        previous = signal.signal(signal.SIGTERM, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def _on_signal(self, number: int, frame: object) -> None:
        self.terminated = True

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Save and stop, on every process after the same step."""
        if args.world_size > 1:
            flag = torch.tensor(int(self.terminated), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self.terminated = bool(flag)
        if self.terminated and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Leave out the evaluation of an epoch that did not end."""
        # Trainer comes here also in the middle of an epoch, where no evaluation is due; after a
        # real one the checkpoint is written again, so that it knows the evaluation
        if self.terminated and state.global_step < state.max_steps:
            is_real_end = float(state.epoch).is_integer()
            control.should_evaluate = control.should_evaluate and is_real_end
            control.should_save = is_real_end
