"""Callbacks that medft adds to Trainer: what stops a run, and what is written during it.

One class each for non-finite values, parameters without gradient, the epoch of samplers, intervals,
the log history, a lost lock, checkpoint manifests and best_model/.
"""

import functools
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from medft.errors import BaseModelError, RunError
from medft.models.saved import RunLayout
from medft.training.best_model import metric_name
from medft.training.checkpoints import checkpoints_of, step_of, write_manifest
from medft.training.process import wait_for_everyone
from medft.training.run_lock import RunLock

logger = logging.getLogger(__name__)

_OF_ADAPTER = ("lora_", "modules_to_save.")
"""Parts of the names of an adapter's tensors."""

SHOWN_ROWS = 8
"""Maximum number of row ids in the error."""


class NonFiniteCallback(TrainerCallback):
    """Raises before a NaN or infinite gradient, weight or loss reaches a checkpoint.

    Checks the gradients before an optimizer step and the weights after it, so that no checkpoint
    holds a non-finite weight. Gradients are not checked under float16, where loss scaling skips
    such a step, nor under DeepSpeed, which does not expose them.
    """

    def __init__(self, row_ids: Callable[[], list[str]]) -> None:
        """Create the callback; `row_ids` returns the ids of the step's rows."""
        self._row_ids = row_ids

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module,
        **kwargs: Any,
    ) -> None:
        """Check the gradients before the optimizer uses them."""
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
        """Check the weights after the step."""
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
        """Check the logged training and validation loss."""
        values = [torch.tensor(logs[name]) for name in ("loss", "eval_loss") if name in logs]
        self._check(values, "loss", state.global_step)

    def _check(self, tensors: list[torch.Tensor], name: str, step: int) -> None:
        if tensors and not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
            ids = self._row_ids()
            more = f" and {len(ids) - SHOWN_ROWS} more" if len(ids) > SHOWN_ROWS else ""
            raise RunError(
                f"expected every {name} of step {step} to be finite, some are NaN or infinite "
                f"after the rows {', '.join(ids[:SHOWN_ROWS])}{more}: look at them, lower "
                f"train.learning_rate or use model.dtype: float32, and resume from the last "
                f"checkpoint"
            )


class UntrainedParameterCallback(TrainerCallback):
    """Raises at the end of the first complete epoch if an adapter tensor has had no gradient.

    Such a tensor sits on a layer that no row runs, or whose adapter is never called, and would be
    saved untrained. A partial epoch proves nothing: its rows may be of one modality.
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
        """Register a gradient hook on each adapter tensor."""
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and any(part in name for part in _OF_ADAPTER):
                self._without.add(name)
                seen = functools.partial(self._seen, name)
                self._handles.append(parameter.register_hook(seen))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record whether the epoch starts here or continues from a checkpoint."""
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
        """Check for tensors without gradient; Trainer calls this mid-epoch, too, when it stops."""
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
                f"lora.targets and lora.modules_to_save"
            )


class SetEpochCallback(TrainerCallback):
    """Sets the epoch of a sampler or dataset, even one that Accelerate's wrappers hide."""

    def __init__(self, set_epoch: Callable[[int], None]) -> None:
        self._set_epoch = set_epoch

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch, counted from 0, that starts or continues."""
        self._set_epoch(int(state.epoch or 0))


class IntervalCallback(TrainerCallback):
    """Logs, evaluates and saves as the recipe says; Trainer would follow the resumed checkpoint."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the intervals, in steps."""
        state.compute_steps(args, state.max_steps)


class MissingEvaluationCallback(TrainerCallback):
    """Makes the evaluation in which a run was stopped, before it goes on; it stands last.

    It counts for the best model, early stopping and schedules that follow evaluations, for none of
    which Trainer's `eval_on_start` does.
    """

    def __init__(self, evaluate: Callable[[], None]) -> None:
        self._evaluate = evaluate

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make it."""
        self._evaluate()


class FirstValidationCallback(TrainerCallback):
    """Computes a validation batch before the first step, so that what cannot run fails at once."""

    def __init__(self, compute: Callable[[], None]) -> None:
        self._compute = compute

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Compute it."""
        self._compute()


class LogHistoryCallback(TrainerCallback):
    """Writes the log history at every save."""

    def __init__(self, write: Callable[[TrainerState], None]) -> None:
        self.write = write

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Write the log history beside the checkpoint."""
        self.write(state)


class LostLockCallback(TrainerCallback):
    """Raises before anything is written into a run directory that another run has taken."""

    def __init__(self, lock: RunLock) -> None:
        self._lock = lock

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Look before a save or an evaluation, which may write best_model/."""
        if control.should_save or control.should_evaluate:
            self._lock.check()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look before what is due at the end of an epoch."""
        self._lock.check()


class CheckpointManifestCallback(TrainerCallback):
    """Writes a checkpoint's manifest once every process has saved, then deletes old checkpoints.

    Trainer would delete old checkpoints before the new one is known to be complete.
    """

    def __init__(
        self, save_total_limit: int | None, took: Callable[[float], None] = lambda seconds: None
    ) -> None:
        """Create the callback.

        Args:
            save_total_limit: checkpoints that are kept; None for all.
            took: called on every process with the seconds of each save.
        """
        self.save_total_limit = save_total_limit
        self._took = took
        self._since = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note when a save may begin: after a step, or what follows it."""
        if control.should_save and torch.accelerator.is_available():
            torch.accelerator.synchronize()  # the step's computation is none of the save
        self._since = time.monotonic()

    on_log = on_evaluate = on_step_end

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Write the manifest of the checkpoint that was just saved."""
        wait_for_everyone()
        seconds = time.monotonic() - self._since
        self._took(seconds)
        if not args.should_save:
            return
        run = Path(args.output_dir)
        checkpoint = run / f"checkpoint-{state.global_step}"
        write_manifest(checkpoint, world_size=args.world_size, seconds=seconds)
        if self.save_total_limit:
            # later ones are left of a run that went on from before them, complete or not
            saved = [path for path in checkpoints_of(run) if step_of(path) <= state.global_step]
            for old in saved[self.save_total_limit :]:
                shutil.rmtree(old)


class BestModelCallback(TrainerCallback):
    """Writes best_model/ at each evaluation that improves the metric, whatever save_steps is.

    The evaluation of `eval_on_start` counts as the first, which Trainer leaves out. What else
    compares with the best value must stand before this callback.
    """

    def __init__(self, save: Callable[[Path], None]) -> None:
        self.save = save

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Compare with the best value so far, which Trainer updates after this call."""
        value, best = metrics[metric_name(args)], state.best_metric
        if best is None or (value > best if args.greater_is_better else value < best):
            try:
                self.save(RunLayout(Path(args.output_dir)).best_model)
            except BaseModelError as error:  # no step has changed every layer yet
                logger.warning("step %s: no best_model/: %s", state.global_step, error)
            if state.global_step == 0:
                state.best_metric, state.best_global_step = value, 0
