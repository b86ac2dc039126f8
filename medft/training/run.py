"""The run directory: recipe, record, log history, checkpoints and results of a run.

`recipe.yaml` is the resolved recipe, `run.json` the record, `log_history.json` Trainer's list and
`curves.png` its plot. Only rank 0 writes them.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from transformers import EarlyStoppingCallback, TrainerState, TrainingArguments

from medft.compat import num_weights
from medft.config.recipe import Recipe, dump_sections
from medft.errors import Stopped
from medft.files import replaced_file, write_json
from medft.models.resolved import (
    Recorded,
    apply_determinism,
    check_applied,
    determinism,
    resolved_arguments,
    resolved_deepspeed,
    resolved_model,
)
from medft.models.saved import RunLayout
from medft.provenance import masked, now, peak_memory
from medft.training.arguments import batch_arithmetic
from medft.training.best_model import (
    BestEvaluation,
    KnownBestCallback,
    SaveAfterEvaluationCallback,
)
from medft.training.callbacks import (
    BestModelCallback,
    CheckpointManifestCallback,
    IntervalCallback,
    LogHistoryCallback,
    LostLockCallback,
    MissingEvaluationCallback,
    NonFiniteCallback,
    UntrainedParameterCallback,
)
from medft.training.checkpoints import evaluation_is_missing, has_ended, seconds_to_save, state_of
from medft.training.curves import draw_curves
from medft.training.doubts import LossFallsCallback
from medft.training.failures import cleared, named_failures
from medft.training.launched import Launch, find_launch, how_to_stop
from medft.training.overflow import OverflowCallback
from medft.training.parts import SavedStepCallback, first_entries, go_on, update_part
from medft.training.process import wait_for_everyone
from medft.training.progress import last_line, show_training
from medft.training.results import final_metrics, save_best, save_result
from medft.training.resume import OutputDir, clear_output_dir
from medft.training.run_lock import RunLock
from medft.training.same_run import (
    PreparedData,
    check_as_recorded,
    check_state,
    identify_run,
)
from medft.training.signals import StopSignals
from medft.training.trainer import RowTrackingTrainer

logger = logging.getLogger(__name__)


class Run:
    """A training run and its directory; created by `open_run`."""

    def __init__(
        self,
        layout: RunLayout,
        record: dict[str, Any],
        *,
        resolved: dict[str, Any],
        recorded: Recorded | None,
        early_stopping: dict[str, Any],
        signals: StopSignals,
        lock: RunLock,
        writes: bool,
    ) -> None:
        self.layout = layout
        self.record = record
        self.stopped = "before the first step: start again with train.resume_from_checkpoint=auto"
        """Where a signal has stopped the run, and how it goes on."""

        self._resolved = resolved
        self._recorded = recorded
        self._early_stopping = early_stopping
        self._signals = signals
        self._lock = lock
        self._writes = writes

    @property
    def base(self) -> dict[str, Any]:
        """What identifies the base, as from `identify_base`."""
        return self.record["base"]

    @property
    def _may_write(self) -> bool:
        """Whether this is the process that writes, and the folder still the run's."""
        return self._writes and not self._lock.lost

    def update(self, **entries: Any) -> None:
        """Add entries to run.json."""
        self.record.update(entries)
        update_part(self.record)
        if self._may_write:
            write_json(self.layout.record, masked(self.record))

    def end(self, status: Literal["interrupted", "failed"], reason: str) -> None:
        """Record why the run has ended, unless it is completed."""
        if self.record["status"] == "running":
            with suppress(OSError):  # others have filled the disk, which the error says
                self.update(status=status, error=reason, ended=now())

    def train(self, trainer: RowTrackingTrainer, checkpoint: Path | None) -> None:
        """Train, keep complete checkpoints and the best model, and write adapter/ or model/.

        Args:
            trainer: with dataset and model.
            checkpoint: a complete checkpoint to continue from.

        Raises:
            Stopped: a signal arrived; a checkpoint to resume from was saved.
            RunError: the loss, a gradient or a weight is NaN or infinite, or an adapter tensor had
                no gradient in an epoch; what a record holds could not be applied; or another run
                has taken the folder.
        """
        resolved = (
            self._resolved
            | resolved_model(trainer.model)
            | {"determinism": determinism().model_dump()}
        )
        if self._recorded:
            check_applied(resolved, self._recorded)
        trainer.signals, trainer.check_folder = self._signals, self._lock.check
        self._add_callbacks(trainer, checkpoint)
        parameters = list(trainer.model.parameters())
        self.update(
            trainable_parameters=sum(num_weights(p) for p in parameters if p.requires_grad),
            total_parameters=sum(map(num_weights, parameters)),
            resumed_from=checkpoint.name if checkpoint else None,
            resolved=resolved,
        )
        try:
            with self._signals.deferred():
                self._train(trainer, checkpoint)
                self._write_result(trainer)
        except Stopped as stop:
            self._note_stop(trainer, stop)
            raise
        self.stopped = "after its result was written"

    def _train(self, trainer: RowTrackingTrainer, checkpoint: Path | None) -> None:
        if checkpoint and has_ended(checkpoint, steps=self.record["batch"]["steps"]):
            trainer.load_checkpoint(checkpoint)  # only the result was not written
            trainer.state = state_of(checkpoint)
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def _write_result(self, trainer: RowTrackingTrainer) -> None:
        """Write adapter/ or model/; a signal waits for it, since no step is left to stop after."""
        self._lock.check()
        self.write_history(trainer.state)
        is_adapter = hasattr(trainer.model, "peft_config")
        save_result(trainer, self.layout.adapter if is_adapter else self.layout.model)
        self.update(
            status="completed",
            steps_done=trainer.state.global_step,
            metrics=final_metrics(trainer.state.log_history),
            best_metric=self._best_metric(trainer.state),
            peak_memory_bytes=peak_memory(),
            ended=now(),
        )
        if self._writes:
            has_validation = trainer.eval_dataset is not None
            logger.info("%s", last_line(self.layout, trainer.state, evaluates=has_validation))
        wait_for_everyone()  # a launcher ends the others where one process fails as it exits

    def _note_stop(self, trainer: RowTrackingTrainer, stop: Stopped) -> None:
        """Record after which step a signal has stopped the run, and end what callbacks began."""
        state = trainer.state
        if not state.max_steps:  # training has not begun
            return
        kept = trainer.kept or "at once, go on with train.resume_from_checkpoint=auto"
        self.stopped = f"after step {state.global_step} of {state.max_steps}: {kept}"
        self.update(steps_done=state.global_step)
        if not stop.at_once:
            trainer.end_early()
            self.write_history(state)

    def _add_callbacks(self, trainer: RowTrackingTrainer, checkpoint: Path | None) -> None:
        seconds = seconds_to_save(checkpoint) if checkpoint else 0.0
        stop = how_to_stop(Launch(**self.record["launch"]), seconds)
        show_training(trainer, self.record["batch"], stop)
        limit = trainer.args.save_total_limit
        manifests = CheckpointManifestCallback(limit, trainer.leave_out_of_rates)
        trainer.args.save_total_limit = None  # `manifests` deletes, once the new one is complete
        trainer.add_callback(IntervalCallback())
        trainer.add_callback(LostLockCallback(self._lock))
        trainer.add_callback(NonFiniteCallback(lambda: trainer.row_ids))
        trainer.add_callback(UntrainedParameterCallback())
        trainer.add_callback(LossFallsCallback())
        if trainer.args.fp16:
            trainer.add_callback(OverflowCallback())
        trainer.add_callback(LogHistoryCallback(self.write_history))
        trainer.add_callback(manifests)
        trainer.add_callback(SavedStepCallback(lambda step: self.update(saved_step=step)))
        trainer.add_callback(SaveAfterEvaluationCallback())
        if self._early_stopping:
            trainer.add_callback(EarlyStoppingCallback(**self._early_stopping))
        else:
            trainer.add_callback(KnownBestCallback(self.layout.best_model))
        if trainer.eval_dataset is not None:
            trainer.add_callback(BestModelCallback(lambda folder: save_best(trainer, folder)))
        if checkpoint:
            trainer.args.eval_on_start = False
            if evaluation_is_missing(checkpoint):
                trainer.add_callback(MissingEvaluationCallback(trainer.make_up_for_evaluation))

    def _best_metric(self, state: TrainerState) -> float | None:
        """The metric of best_model/; None if there is none, as when the untrained base was best."""
        if self.layout.best_model.is_dir():
            best = BestEvaluation.read(self.layout.best_model)
            return best.value if best else state.best_metric
        if state.best_metric is not None:
            logger.warning(
                "no best_model/: the best evaluation, %s at step %s, was of a model with untrained "
                "layers, such as the base",
                state.best_metric,
                state.best_global_step,
            )
        return None

    def write_history(self, state: TrainerState) -> None:
        """Write log_history.json and curves.png."""
        if self._may_write:
            history = [
                {k: v if math.isfinite(v) else None for k, v in entry.items()}
                for entry in state.log_history
            ]
            write_json(self.layout.history, history)
            draw_curves(
                history,
                self.layout.curves,
                best_by=self.record["recipe"]["train"].get("metric_for_best_model") or "eval_loss",
                best_step=state.best_global_step,
            )


@contextmanager
def open_run(
    recipe: Recipe,
    argv: list[str],
    *,
    arguments: TrainingArguments,
    prepared: PreparedData,
    folder: OutputDir,
    signals: StopSignals,
    recorded: Recorded | None = None,
) -> Iterator[Run]:
    """The run of a recipe, with its directory created and its record begun.

    Everything must have been checked before, but what identifies the run, which is checked here:
    after that writing begins. An exception inside the block sets `status` in run.json to failed
    (interrupted for a signal).

    Args:
        recipe: the resolved recipe.
        argv: the command line.
        arguments: the trainer's.
        prepared: the data, and the adapter of `lora.init_from`.
        folder: of the run, taken, with the checkpoint to continue from.
        signals: of this process, listened to.
        recorded: the record of the run that is repeated.

    Raises:
        RunError: the run cannot continue from the checkpoint, or is not that of the record.
        BaseModelError: the adapter of `lora.init_from` was trained on another base.
    """
    checkpoint = folder.checkpoint
    identity = identify_run(recipe, prepared, checkpoint, world_size=arguments.world_size)
    batch = batch_arithmetic(prepared.batches_per_epoch, arguments)
    if recorded:
        check_as_recorded(recipe, recorded)
        apply_determinism(recorded.resolved.determinism)
    if checkpoint:
        check_state(recipe.train, checkpoint, steps=batch["steps"])
    layout = RunLayout(Path(recipe.train.output_dir))
    wait_for_everyone()  # every process has seen the folder as it is before rank 0 writes
    writes = arguments.process_index == 0
    entries = {
        **first_entries(recipe, argv, asdict(find_launch(arguments))),
        "batch": batch | prepared.batch_record,
        **identity,
    }
    if writes:
        folder.lock.check()
        layout.directory.mkdir(parents=True, exist_ok=True)
        go_on(layout, entries, checkpoint)
        if checkpoint is None:
            clear_output_dir(layout)
    run = Run(
        layout,
        entries,
        resolved={
            "arguments": resolved_arguments(arguments),
            "deepspeed": resolved_deepspeed(arguments),
        },
        recorded=recorded,
        early_stopping=recipe.train.early_stopping(),
        signals=signals,
        lock=folder.lock,
        writes=writes,
    )
    run.update()
    if writes:
        sections = masked(recipe.model_dump())
        sections["train"].pop("resume_from_checkpoint", None)  # so that it can be run again
        with replaced_file(layout.recipe) as file:
            file.write(dump_sections(sections))
    try:
        with (
            cleared(layout.directory, folder.lock) if writes else nullcontext(),
            named_failures(recipe, arguments, prepared.record),
        ):
            yield run
    except Stopped as stop:
        run.end("interrupted", f"stopped by {stop}")
        logger.warning("stopped by %s %s", stop, run.stopped)
        raise
    except BaseException as error:
        run.end("failed", f"{type(error).__name__}: {error}".splitlines()[0])
        raise
