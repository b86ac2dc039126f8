"""What a training shows: a line at its start, one for each log entry, and one at its end.

The lines are the same on a terminal, above the progress bar, and in a file.
"""

import logging
import shlex
import time
from datetime import timedelta
from typing import Any

from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from medft.metrics.retrieval import RECALLS, WAYS
from medft.models.saved import RunLayout
from medft.training.schedule import Schedule, schedule
from medft.training.trainer import RowTrackingTrainer

logger = logging.getLogger(__name__)

_FIRST = (
    "loss",
    "perplexity",
    "token_accuracy",
    "mean_token_accuracy",
    "image_to_text_recall@1",
    "text_to_image_recall@1",
    "chance_recall@1",
    "excess",
    "grad_norm",
    "learning_rate",
)
"""What says most about a training; the line begins with these, in this order."""

_LEFT_OUT = {
    "epoch",
    "total_flos",
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "floor",
    "positive_logit",
    "negative_logit",
    "entropy",
    "num_tokens",
    "supervised_tokens",
    *(f"{way}_recall@{k}" for way in (*WAYS, "chance") for k in RECALLS[1:]),
}
"""Entries of log_history.json that no line shows, unless they choose best_model/."""


def show_training(trainer: RowTrackingTrainer, batch: dict[str, int], last_clause: str) -> None:
    """Show a training by medft's lines instead of Trainer's.

    Args:
        trainer: before training.
        batch: from `batch_arithmetic`.
        last_clause: ends the first line.
    """
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(BarCallback())
    trainer.add_callback(LinesCallback(batch, last_clause))


class BarCallback(ProgressCallback):
    """Trainer's progress bars without its lines."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Leave the entry to LinesCallback."""


class LinesCallback(TrainerCallback):
    """Logs a line when training begins, and one for each log entry."""

    def __init__(self, batch: dict[str, int], last_clause: str) -> None:
        """Create the callback.

        Args:
            batch: from `batch_arithmetic`.
            last_clause: ends the first line.
        """
        self._batch = batch
        self._last_clause = last_clause
        self._started = 0.0
        self._start = self._to_evaluate = 0
        self._seconds: list[float] = []
        """Of each evaluation."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> None:
        """Log what will be trained, and start the clock."""
        plan = schedule(
            args,
            steps=state.max_steps,
            steps_per_epoch=self._batch["steps_per_epoch"],
            start=state.global_step,
        )
        logger.info("%s", start_line(model, args, plan, self._batch, self._last_clause))
        self._started, self._start = time.perf_counter(), state.global_step
        self._to_evaluate = len(plan.evaluations)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Log the entry's line; the one of Trainer's totals has none."""
        if "train_runtime" in logs:
            return
        if "eval_runtime" in logs:
            self._seconds.append(logs["eval_runtime"])
        best_by = (args.metric_for_best_model or "").removeprefix("eval_")
        line = log_line(logs, state, best_by=best_by, seconds_left=self._seconds_left(state))
        logger.info("%s", line)

    def _seconds_left(self, state: TrainerState) -> float | None:
        """By the steps and evaluations since training began here; None before the first step."""
        done = state.global_step - self._start
        if done == 0:
            return None
        training = time.perf_counter() - self._started - sum(self._seconds)
        evaluation = sum(self._seconds) / max(len(self._seconds), 1)
        to_evaluate = max(self._to_evaluate - len(self._seconds), 0)
        return training / done * (state.max_steps - state.global_step) + evaluation * to_evaluate


def log_line(
    logs: dict[str, float], state: TrainerState, *, best_by: str, seconds_left: float | None
) -> str:
    """A log entry such as "step 20/165 (12 %), 0:04:10 left: loss 2.307, grad_norm 1.1".

    Args:
        logs: the entry, as Trainer logs it.
        state: the trainer's.
        best_by: the metric that chooses best_model/, which comes first.
        seconds_left: None if it is not known.
    """
    where = f"step {state.global_step}/{state.max_steps}"
    where += f" ({100 * state.global_step // state.max_steps} %)"
    if seconds_left is not None:
        where += f", {timedelta(seconds=round(seconds_left))} left"
    if "eval_loss" in logs:
        where += ", evaluation"
    named = {name.removeprefix("eval_"): value for name, value in logs.items()}
    if named.get("floor") == 0:
        named.pop("excess")  # the loss again
    order = [name for name in dict.fromkeys((best_by, *_FIRST)) if name in named]
    order += [name for name in named if name not in order and name not in _LEFT_OUT]
    return f"{where}: {', '.join(f'{name} {_shown(named[name])}' for name in order)}"


def _shown(value: float) -> str:
    """Four significant digits, and every one before the point."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def start_line(
    model: PreTrainedModel,
    arguments: TrainingArguments,
    plan: Schedule,
    batch: dict[str, int],
    last_clause: str,
) -> str:
    """What is trained, in how many steps of how many rows, on what, and when checkpoints come.

    Args:
        model: with its adapter.
        arguments: the trainer's.
        plan: when checkpoints and evaluations come.
        batch: from `batch_arithmetic`.
        last_clause: ends the line.
    """
    base = model.config.model_type
    if hasattr(model, "peft_config"):
        bits = "4-bit " if getattr(model, "is_loaded_in_4bit", False) else ""
        what = f"an adapter on a {bits}{base}"
    else:
        what = f"every weight of a {base}"
    resumed = f" from step {plan.start}" if plan.start else ""
    processes = f"{batch['world']} process{'es' if batch['world'] > 1 else ''}"
    epochs, rows = plan.end / batch["steps_per_epoch"], batch["effective"]
    parts = [
        f"training {what}{resumed}: {plan.end} steps in {epochs:.3g} epoch{'s' * (epochs != 1)}, "
        f"{rows} row{'s' * (rows != 1)} a step ({batch['per_device']} per device x "
        f"{batch['accumulation']} accumulation x {processes}) on {arguments.device.type}",
        *plan.sentences(),
        last_clause,
    ]
    return "; ".join(parts)


def last_line(layout: RunLayout, state: TrainerState, *, evaluates: bool) -> str:
    """Where the result of a training is, and what to run next.

    Args:
        layout: of the run, its result written.
        state: the trainer's.
        evaluates: whether there are validation rows.
    """
    run, [result] = layout.directory, layout.results
    where = f"done: {result}"
    if layout.best_model.is_dir() and state.best_global_step != state.global_step:
        where += f" (step {state.global_step}), {layout.best_model} (step {state.best_global_step})"
    against = " --against base" if result == layout.adapter else ""
    data = "" if evaluates else " --data FILE"
    out = shlex.quote(f"{run}_evaluation")
    return f"{where}; next: medft evaluate {shlex.quote(str(run))}{data}{against} --out {out}"
