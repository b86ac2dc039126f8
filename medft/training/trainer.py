"""A Trainer that tracks the row ids of each step, its throughput and its wait for data.

Where a row cannot be read or a signal asks it to stop, it saves a checkpoint first.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from medft.compat import HookedTrainer
from medft.errors import DataError, Stopped
from medft.provenance import peak_memory
from medft.training.broken_data import (
    BrokenBatchError,
    EpochStartCallback,
    WatchedLoader,
    fetch_together,
)
from medft.training.checkpoints import what_is_missing
from medft.training.mixed_precision import Float32Callback, autocast_under_deepspeed
from medft.training.random_states import same_numbers_after
from medft.training.signals import StopSignals

ROW_IDS = "row_ids"
"""Batch key of the row ids, which are never passed to the model."""


class RowTrackingTrainer(HookedTrainer):
    """A Trainer whose collator puts row ids beside its tensors, under ROW_IDS."""

    def __init__(self, model: nn.Module, args: TrainingArguments, **kwargs: Any) -> None:
        autocast_under_deepspeed(model, args)
        super().__init__(model, args, **kwargs)
        self.row_ids: list[str] = []
        self.signals = StopSignals()
        """What is looked at before each step and each batch of an evaluation."""

        self.check_folder: Callable[[], None] = lambda: None
        """Raises if another run has the folder; called before a stopped training is saved."""

        self.kept = ""
        """What a stopped training has kept and how it goes on, as a part of a sentence."""

        self._since: float | None = None  # training has not begun
        self._epoch_start = EpochStartCallback()
        self.add_callback(self._epoch_start)
        self.add_callback(Float32Callback())
        self._restart_measuring()

    def _restart_measuring(self) -> None:
        self._rows_taken = self._tokens_taken = 0
        self._seconds_waited = 0.0

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | int | None]:
        """The micro-batches of a step; their row ids are stored in `row_ids`.

        Raises:
            DataError: a row cannot be read, on any process; a checkpoint was saved.
            Stopped: a signal arrived, on any process; a checkpoint was saved.
        """
        started = time.perf_counter()
        self._since = self._since or started
        with self._saving_what_is_done():
            fetched = self._fetch(epoch_iterator, num_batches)
        batches, items = super().get_batch_samples(iter(fetched), num_batches, device)
        self._seconds_waited += time.perf_counter() - started
        self.row_ids = [name for batch in batches for name in batch.pop(ROW_IDS)]
        self._rows_taken += len(self.row_ids)
        self._tokens_taken += sum(int((b["labels"] >= 0).sum()) for b in batches if "labels" in b)
        return batches, items

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The metrics of an evaluation, which changes nothing of what is trained or timed.

        Raises:
            DataError: a row cannot be read, on any process; a checkpoint was saved.
            Stopped: a signal arrived, on any process; a checkpoint was saved.
        """
        started = time.perf_counter()
        left_out = "without its evaluation, which a resumed run begins with, "
        try:
            with self._saving_what_is_done(left_out), same_numbers_after():
                return super().evaluate(*args, **kwargs)
        finally:
            self.leave_out_of_rates(time.perf_counter() - started)

    def leave_out_of_rates(self, seconds: float) -> None:
        """Count seconds, since the last log entry, as none of training."""
        if self._since is not None:
            self._since += seconds

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own, whose batches every process can read or none goes on."""
        watched: Any = WatchedLoader(dataloader, self._fetch)
        return super().evaluation_loop(watched, *args, **kwargs)

    def _fetch(self, batches: Iterator[Any], count: int) -> list[Any]:
        """The next batches, where every process can read its own and none is asked to stop."""
        if self.is_in_train and self.state.global_step < self.state.max_steps:
            self.signals.raise_agreed(self.args.device)
        return fetch_together(batches, count, self.args)

    @contextmanager
    def _saving_what_is_done(self, left_out: str = "") -> Iterator[None]:
        """Save a checkpoint if a row in the block cannot be read or a signal ends the training."""
        try:
            yield
        except BrokenBatchError as error:
            if not self.is_in_train:
                raise
            self.kept = self._save_what_is_done(left_out)
            raise DataError(*(f"{problem}; {self.kept}" for problem in error.problems)) from error
        except Stopped as stop:
            if not stop.at_once:
                self.kept = self._save_what_is_done(left_out)
            raise

    def _save_what_is_done(self, left_out: str) -> str:
        step = self.state.global_step
        if step == 0:
            return "no step was done yet, start again with train.resume_from_checkpoint=auto"
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        if what_is_missing(folder) is not None:
            self.check_folder()
            self._epoch_start.put_back(step)
            try:
                self.save_checkpoint()
            except OSError as error:
                return f"step {step} could not be saved ({error}), resume from an earlier one"
        return (
            f"{folder} is saved {left_out}and the run goes on from it with the same command and "
            f"train.resume_from_checkpoint=true"
        )

    def end_early(self) -> None:
        """Let callbacks end as after training: progress bars, and services that get the log."""
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add this process's rows and supervised tokens per second, data wait and peak memory."""
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

    def to_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Model inputs with their tensors on the trainer's device; row ids are left out."""
        return super().to_device({k: v for k, v in inputs.items() if k != ROW_IDS})
