"""The run directory: recipe, record, log history, checkpoints and results of a run.

`recipe.yaml` is the resolved recipe, `run.json` the record, `log_history.json` Trainer's list and
`curves.png` its plot. Only rank 0 writes them.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerState, TrainingArguments

from medft.compat import num_weights, untested_versions
from medft.config.recipe import Recipe, dump_sections
from medft.errors import Terminated
from medft.files import complete_folder, replaced_file, write_json
from medft.models.adapter import refuse_inert
from medft.models.resolved import (
    Recorded,
    apply_determinism,
    check_applied,
    determinism,
    resolved_arguments,
    resolved_deepspeed,
    resolved_model,
)
from medft.models.saved import WEIGHTS_FILE, RunLayout
from medft.provenance import (
    hardware,
    masked,
    masked_words,
    medft_version,
    now,
    package_versions,
    peak_memory,
)
from medft.training.arguments import batch_arithmetic
from medft.training.callbacks import (
    BestModelCallback,
    CheckpointManifestCallback,
    IntervalCallback,
    LogHistoryCallback,
    NonFiniteCallback,
    SignalCallback,
    UntrainedParameterCallback,
)
from medft.training.checkpoints import state_of, step_of
from medft.training.curves import draw_curves
from medft.training.doubts import LossFallsCallback
from medft.training.launched import Launch, find_launch
from medft.training.overflow import OverflowCallback
from medft.training.process import wait_for_everyone
from medft.training.progress import last_line, show_training
from medft.training.resume import (
    PreparedData,
    check_as_recorded,
    check_state,
    identify_run,
)
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
        writes: bool,
    ) -> None:
        self.layout = layout
        self.record = record
        self._resolved = resolved
        self._recorded = recorded
        self._early_stopping = early_stopping
        self._writes = writes

    @property
    def base(self) -> dict[str, Any]:
        """What identifies the base, as from `identify_base`."""
        return self.record["base"]

    def update(self, **entries: Any) -> None:
        """Add entries to run.json."""
        self.record.update(entries)
        if self._writes:
            write_json(self.layout.record, masked(self.record))

    def train(self, trainer: RowTrackingTrainer, checkpoint: Path | None) -> None:
        """Train, keep complete checkpoints and the best model, and write adapter/ or model/.

        Args:
            trainer: with dataset and model.
            checkpoint: a complete checkpoint to continue from.

        Raises:
            Terminated: SIGTERM arrived; a checkpoint to resume from was saved.
            RunError: the loss, a gradient or a weight is NaN or infinite, or an adapter tensor had
                no gradient in an epoch; or what a record holds could not be applied.
        """
        resolved = (
            self._resolved
            | resolved_model(trainer.model)
            | {"determinism": determinism().model_dump()}
        )
        if self._recorded:
            check_applied(resolved, self._recorded)
        signals = SignalCallback()
        self._add_callbacks(trainer, signals)
        parameters = list(trainer.model.parameters())
        self.update(
            trainable_parameters=sum(num_weights(p) for p in parameters if p.requires_grad),
            total_parameters=sum(map(num_weights, parameters)),
            resumed_from=checkpoint.name if checkpoint else None,
            resolved=resolved,
        )
        if checkpoint and (saved := state_of(checkpoint)).global_step >= saved.max_steps:
            trainer.load_checkpoint(checkpoint)  # only the result was not written
            trainer.state = saved
        else:
            if checkpoint:
                trainer.args.eval_on_start = False  # it was, before the first step
            with signals.listening():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self.write_history(trainer.state)
        if signals.terminated and trainer.state.global_step < trainer.state.max_steps:
            self.update(status="interrupted", steps_done=trainer.state.global_step)
            raise Terminated
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

    def _add_callbacks(self, trainer: RowTrackingTrainer, signals: SignalCallback) -> None:
        show_training(trainer, self.record["batch"])
        manifests = CheckpointManifestCallback(trainer.args.save_total_limit)
        trainer.args.save_total_limit = None  # `manifests` deletes, once the new one is complete
        trainer.add_callback(IntervalCallback())
        trainer.add_callback(NonFiniteCallback(lambda: trainer.row_ids))
        trainer.add_callback(UntrainedParameterCallback())
        trainer.add_callback(LossFallsCallback())
        if trainer.args.fp16:
            trainer.add_callback(OverflowCallback())
        trainer.add_callback(LogHistoryCallback(self.write_history))
        trainer.add_callback(manifests)
        trainer.add_callback(signals)
        if self._early_stopping:
            trainer.add_callback(EarlyStoppingCallback(**self._early_stopping))
        if trainer.eval_dataset is not None:
            trainer.add_callback(BestModelCallback(lambda folder: save_result(trainer, folder)))

    def _best_metric(self, state: TrainerState) -> float | None:
        """The metric of best_model/; None if there is none, as when the untrained base was best."""
        if self.layout.best_model.is_dir():
            return state.best_metric
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
        if self._writes:
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
    checkpoint: Path | None,
    recorded: Recorded | None = None,
) -> Iterator[Run]:
    """The run of a recipe, with its directory created and its record begun.

    Everything must have been checked before, but what identifies the run, which is checked here:
    after that writing begins. An exception inside the block sets `status` in run.json to failed
    (interrupted for Ctrl-C).

    Args:
        recipe: the resolved recipe.
        argv: the command line.
        arguments: the trainer's.
        prepared: the data, and the adapter of `lora.init_from`.
        checkpoint: to continue from; None for a new run.
        recorded: the record of the run that is repeated.

    Raises:
        RunError: the run cannot continue from the checkpoint, or is not that of the record.
        BaseModelError: the adapter of `lora.init_from` was trained on another base.
    """
    identity = identify_run(recipe, prepared, checkpoint, world_size=arguments.world_size)
    batch = batch_arithmetic(prepared.batches_per_epoch, arguments)
    if recorded:
        check_as_recorded(recipe, recorded)
        apply_determinism(recorded.resolved.determinism)
    if checkpoint:
        check_state(recipe.train, checkpoint, steps=batch["steps"])
    layout = RunLayout(Path(recipe.train.output_dir))
    launch = find_launch(arguments)
    wait_for_everyone()  # every process has seen the folder empty before rank 0 writes
    writes = arguments.process_index == 0
    entries = {
        **_circumstances(recipe, argv),
        "launch": asdict(launch),
        "batch": batch | prepared.batch_record,
        **identity,
    }
    run = Run(
        layout,
        entries,
        resolved={
            "arguments": resolved_arguments(arguments),
            "deepspeed": resolved_deepspeed(arguments),
        },
        recorded=recorded,
        early_stopping=recipe.train.early_stopping(),
        writes=writes,
    )
    earlier = {}
    if writes:
        layout.directory.mkdir(parents=True, exist_ok=True)
        if checkpoint:
            earlier = _entries_before(layout, checkpoint, launch)
        sections = masked(recipe.model_dump())
        sections["train"].pop("resume_from_checkpoint", None)  # so that it can be run again
        with replaced_file(layout.recipe) as file:
            file.write(dump_sections(sections))
    run.update(**earlier)
    try:
        yield run
    except BaseException as error:
        if run.record["status"] == "running":
            stopped = isinstance(error, KeyboardInterrupt)
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            run.update(status="interrupted" if stopped else "failed", error=reason, ended=now())
        raise


def _circumstances(recipe: Recipe, argv: list[str]) -> dict[str, Any]:
    """The entries of run.json that say what was started where; warns of untested versions."""
    if untested := untested_versions():
        named = ", ".join(f"{name} {version}" for name, version in untested.items())
        logger.warning("not among the versions that medft was tested with: %s", named)
    return {
        "status": "running",
        "medft": medft_version(),
        "argv": masked_words(argv),
        "started": now(),
        "started_in": str(Path.cwd()),
        "recipe": recipe.model_dump(),
        "seed": recipe.train.seed,
        "packages": package_versions(),
        "untested_packages": untested,
        "hardware": hardware(),
    }


def _entries_before(layout: RunLayout, checkpoint: Path, launch: Launch) -> dict[str, Any]:
    """The entries of run.json that a resumed run takes over, or adds to."""
    earlier = layout.read_record()
    _compare_threads(earlier, launch)
    return {
        **{key: earlier[key] for key in ("started", "init_from") if key in earlier},
        "resumed": [*earlier.get("resumed", []), now()],
        "resumed_from_steps": [*earlier.get("resumed_from_steps", []), step_of(checkpoint)],
    }


def _compare_threads(earlier: dict[str, Any], launch: Launch) -> None:
    """Warn where a resumed run sums in another order than before."""
    before = (earlier.get("launch") or {}).get("threads", launch.threads)
    if before != launch.threads:
        logger.warning(
            "the interrupted run had %s threads, this one has %s: numbers differ in their last "
            "bits from those of an undisturbed run; MEDFT_THREADS=%s restores them",
            before,
            launch.threads,
            before,
        )


def save_result(trainer: RowTrackingTrainer, folder: Path) -> None:
    """Write the trained weights, the processor and medft.json as one complete folder."""
    wait_for_everyone()
    if not trainer.args.should_save:
        trainer.write_model(folder)
        return
    with complete_folder(folder) as draft:
        trainer.write_model(draft)
        adapter = draft / WEIGHTS_FILE
        if adapter.is_file():
            refuse_inert(load_file(adapter))


def final_metrics(log_history: list[dict[str, float]]) -> dict[str, float]:
    """The last logged training loss and the metrics of the last evaluation."""
    losses = [entry["loss"] for entry in log_history if "loss" in entry]
    evaluations = [entry for entry in log_history if "eval_loss" in entry]
    metrics = {"loss": losses[-1]} if losses else {}
    if evaluations:
        metrics |= {key: value for key, value in evaluations[-1].items() if key.startswith("eval_")}
    return metrics
