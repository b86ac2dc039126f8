"""A Trainer that tracks the row ids of each step, its throughput and its wait for data.

Where a row cannot be read, it saves a checkpoint first and says how to go on.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from medft.compat import HookedTrainer
from medft.errors import DataError
from medft.provenance import peak_memory
from medft.training.broken_data import (
    BrokenBatchError,
    EpochStartCallback,
    WatchedLoader,
    fetch_together,
)
from medft.training.checkpoints import what_is_missing
from medft.training.mixed_precision import Float32Callback, autocast_under_deepspeed

ROW_IDS = "row_ids"
"""Batch key of the row ids, which are never passed to the model."""


class RowTrackingTrainer(HookedTrainer):
    """A Trainer whose collator puts row ids beside its tensors, under ROW_IDS."""

    def __init__(self, model: nn.Module, args: TrainingArguments, **kwargs: Any) -> None:
        autocast_under_deepspeed(model, args)
        super().__init__(model, args, **kwargs)
        self.row_ids: list[str] = []
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
        """
        started = time.perf_counter()
        self._since = self._since or started
        with self._saving_what_is_done():
            fetched = fetch_together(epoch_iterator, num_batches, self.args)
        batches, items = super().get_batch_samples(iter(fetched), num_batches, device)
        self._seconds_waited += time.perf_counter() - started
        self.row_ids = [name for batch in batches for name in batch.pop(ROW_IDS)]
        self._rows_taken += len(self.row_ids)
        self._tokens_taken += sum(int((b["labels"] >= 0).sum()) for b in batches if "labels" in b)
        return batches, items

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The metrics of an evaluation, whose time is not counted as training time.

        Raises:
            DataError: a row cannot be read, on any process; a checkpoint was saved.
        """
        started = time.perf_counter()
        try:
            with self._saving_what_is_done(left_out="without its evaluation "):
                return super().evaluate(*args, **kwargs)
        finally:
            if self._since is not None:
                self._since += time.perf_counter() - started

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own, whose batches every process can read or none goes on."""
        watched: Any = WatchedLoader(dataloader, self.args)
        return super().evaluation_loop(watched, *args, **kwargs)

    @contextmanager
    def _saving_what_is_done(self, *, left_out: str = "") -> Iterator[None]:
        """Save a checkpoint if a row in the block cannot be read; its error says how to go on."""
        try:
            yield
        except BrokenBatchError as error:
            if not self.is_in_train:
                raise
            advice = self._save_what_is_done(left_out)
            raise DataError(*(f"{problem}; {advice}" for problem in error.problems)) from error

    def _save_what_is_done(self, left_out: str) -> str:
        step = self.state.global_step
        if step == 0:
            return "no step was done yet, start again"
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        if what_is_missing(folder) is not None:
            self._epoch_start.put_back(step)
            try:
                self.save_checkpoint()
            except OSError as error:
                return f"step {step} could not be saved ({error}), resume from an earlier one"
        return (
            f"{folder.name} is saved {left_out}and the run goes on from it with "
            f"train.resume_from_checkpoint=true"
        )

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
