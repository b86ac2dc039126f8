"""What medft adds to Trainer's loop: numbers that are none stop it, SIGTERM ends it in order."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from medft.errors import RunError


class NumberGuard(TrainerCallback):
    """Stops a run before a gradient, a weight or a loss that is no number can be kept.

    A step's gradients are looked at before the optimizer uses them and its weights afterwards, so
    that no checkpoint holds what is broken. Under loss scaling an infinite gradient only skips the
    step; DeepSpeed keeps gradients to itself, and only the weights are looked at.
    """

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

    @staticmethod
    def _check(tensors: list[torch.Tensor], name: str, step: int) -> None:
        if tensors and not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
            raise RunError(
                f"expected every {name} of step {step} to be a number, some are not: lower "
                f"train.learning_rate or use model.dtype: float32, and resume from the last "
                f"checkpoint"
            )


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
        if self.terminated:
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
        if self.terminated:
            is_real_end = float(state.epoch).is_integer()
            control.should_evaluate = control.should_evaluate and is_real_end
            control.should_save = is_real_end
