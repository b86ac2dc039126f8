"""The run directory: what was asked, on what it ran, how it went.

`recipe.yaml` is the resolved recipe, `run.json` the record, `log_history.json` Trainer's list and
`curves.png` its picture. Only the first process writes.
"""

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, Trainer, TrainerState, TrainingArguments

from medft.config.recipe import Recipe, dump_sections
from medft.config.train_keys import EARLY_STOPPING_KEYS
from medft.errors import RunError, Terminated
from medft.files import check_folder_for_output, complete_folder, write_json
from medft.models.lora import WEIGHTS_FILE, refuse_inert
from medft.provenance import (
    hardware,
    masked,
    masked_words,
    medft_version,
    now,
    package_versions,
    peak_memory,
    read_record,
)
from medft.training.callbacks import GradientWitness, HistoryWriter, NumberGuard, SigtermStopper
from medft.training.checkpoints import (
    BestModelKeeper,
    CheckpointKeeper,
    checkpoint_to_resume,
    wait_for_everyone,
    world_size_of,
)

FREE_ON_RESUME = re.compile(
    r"train\.(resume_from_checkpoint|output_dir|report_to|run_name|disable_tqdm|logging_.*|save_.*)"
    r"|model\.vision_cache(_gb)?"
)
"""Recipe keys that may differ when a run goes on, since they do not change what is trained."""


def batch_arithmetic(rows: int, arguments: TrainingArguments) -> dict[str, int]:
    """How rows become optimizer steps, as Trainer counts them.

    Returns:
        per_device, accumulation, world, effective (rows an optimizer step), steps_per_epoch,
        steps and warmup_steps.
    """
    per_device = arguments.per_device_train_batch_size
    accumulation = arguments.gradient_accumulation_steps
    round_size = per_device * arguments.world_size
    steps_per_epoch = math.ceil(math.ceil(rows / round_size) / accumulation)
    steps = arguments.max_steps
    if steps <= 0:
        steps = math.ceil(arguments.num_train_epochs * steps_per_epoch)
    return {
        "per_device": per_device,
        "accumulation": accumulation,
        "world": arguments.world_size,
        "effective": round_size * accumulation,
        "steps_per_epoch": steps_per_epoch,
        "steps": steps,
        "warmup_steps": arguments.get_warmup_steps(steps),
    }


def check_output_dir(train: dict[str, Any]) -> Path | None:
    """The checkpoint to resume from, or None for a fresh start into an empty folder.

    Args:
        train: the recipe's section.

    Raises:
        RunError: the folder is not empty and the run does not resume, or nothing whole is there.
    """
    output_dir, resume = Path(train["output_dir"]), train.get("resume_from_checkpoint")
    check_folder_for_output(output_dir, allow_content=True)
    if not resume and output_dir.exists() and any(output_dir.iterdir()):
        raise RunError(
            f"expected train.output_dir to be empty, {output_dir} is not: choose another "
            f"folder, or resume with train.resume_from_checkpoint=true"
        )
    checkpoint = checkpoint_to_resume(output_dir, resume)
    if checkpoint and checkpoint.absolute().parent != output_dir.absolute():
        raise RunError(
            f"expected train.resume_from_checkpoint to lie in train.output_dir {output_dir}, got "
            f"{checkpoint}: a run goes on in its own folder"
        )
    return checkpoint


def check_same_run(
    recipe: Recipe,
    base: dict[str, Any],
    data: dict[str, Any],
    checkpoint: Path,
    world_size: int | None,
) -> None:
    """Refuse to continue a run with anything changed that decides what is trained.

    Args:
        recipe: as resolved now.
        base: what identifies the base now.
        data: the inputs' record, as read now.
        checkpoint: the one to continue from, in the run's directory.
        world_size: processes now; None where it is not known yet.

    Raises:
        RunError: a recipe key, the base, the data or the number of processes differs, or nothing is
            left to do.
    """
    run = checkpoint.parent
    earlier = read_record(run)
    current, then = (_flat(content) for content in (masked(recipe.model_dump()), earlier["recipe"]))
    changed = sorted(
        key
        for key in current.keys() | then.keys()
        if current.get(key) != then.get(key) and not FREE_ON_RESUME.fullmatch(key)
    )
    if changed:
        listed = ", ".join(f"{key} ({then.get(key)} -> {current.get(key)})" for key in changed)
        raise RunError(
            f"expected the recipe of the interrupted run in {run}, these keys differ: {listed}: "
            f"restore them, or start a new run in another folder"
        )
    for name, content in (("base", base), ("data", data)):
        if masked(content) != earlier[name]:
            raise RunError(
                f"expected the {name} of the interrupted run in {run}, its files have changed: "
                f"restore them, or start a new run in another folder"
            )
    results = [run / name for name in ("adapter", "model") if (run / name).is_dir()]
    if results and state_of(checkpoint).global_step >= earlier.get("steps_done", math.inf):
        raise RunError(
            f"expected an unfinished run to resume in {run}, {checkpoint.name} is its last step: "
            f"take {results[0]}"
        )
    if world_size is not None and world_size_of(checkpoint) != world_size:
        raise RunError(
            f"expected {world_size_of(checkpoint)} processes as in the interrupted run in {run}, "
            f"got {world_size}: the order of the rows would change"
        )


def state_of(checkpoint: Path) -> TrainerState:
    """Trainer's state as a checkpoint holds it."""
    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        return {prefix: content}
    return {
        name: value
        for key, inner in content.items()
        for name, value in _flat(inner, f"{prefix}.{key}" if prefix else str(key)).items()
    }


class Run:
    """A training run and its directory; created by `open_run`."""

    def __init__(self, directory: Path, record: dict[str, Any], *, writes: bool) -> None:
        self.directory = directory
        self.record = record
        self._writes = writes

    def note(self, **entries: Any) -> None:
        """Add entries to run.json."""
        self.record.update(entries)
        if self._writes:
            write_json(self.directory / "run.json", masked(self.record))

    def train(self, trainer: Trainer, checkpoint: Path | None) -> None:
        """Train, keep whole checkpoints and the best model, and write adapter/ or model/.

        Args:
            trainer: a trainer of medft, its dataset and model in place.
            checkpoint: a whole checkpoint to continue from.

        Raises:
            Terminated: SIGTERM came; a checkpoint was saved and can be resumed from.
            RunError: the loss or the gradient is no longer a number.
        """
        arguments = trainer.args
        keeper = CheckpointKeeper(arguments.save_total_limit)
        arguments.save_total_limit = None  # the keeper deletes, once the new one is whole
        stopper = SigtermStopper()
        trainer.add_callback(NumberGuard(lambda: trainer.row_ids))
        trainer.add_callback(GradientWitness())
        trainer.add_callback(HistoryWriter(self.write_history))
        trainer.add_callback(keeper)
        trainer.add_callback(stopper)
        if trainer.eval_dataset is not None:
            trainer.add_callback(BestModelKeeper(lambda folder: save_result(trainer, folder)))
        self._add_early_stopping(trainer)
        parameters = list(trainer.model.parameters())
        self.note(
            trainable_parameters=_count(p for p in parameters if p.requires_grad),
            total_parameters=_count(parameters),
            resumed_from=checkpoint.name if checkpoint else None,
        )
        saved = state_of(checkpoint) if checkpoint else None
        if saved and saved.global_step >= saved.max_steps:
            trainer._load_from_checkpoint(str(checkpoint))  # only the result was not written
            trainer.state = saved
        else:
            with stopper.listening():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self.write_history(trainer.state)
        if stopper.terminated and trainer.state.global_step < trainer.state.max_steps:
            self.note(status="interrupted", steps_done=trainer.state.global_step)
            raise Terminated
        is_adapter = hasattr(trainer.model, "peft_config")
        save_result(trainer, self.directory / ("adapter" if is_adapter else "model"))
        self.note(
            status="completed",
            steps_done=trainer.state.global_step,
            metrics=final_metrics(trainer.state.log_history),
            best_metric=self._best_metric(trainer.state),
            peak_memory_bytes=peak_memory(),
            ended=now(),
        )

    def _best_metric(self, state: TrainerState) -> float | None:
        """The metric of best_model/; None where the untouched base was best."""
        return state.best_metric if (self.directory / "best_model").is_dir() else None

    def _add_early_stopping(self, trainer: Trainer) -> None:
        train = self.record["recipe"]["train"]
        values = {name: train[name] for name in EARLY_STOPPING_KEYS if name in train}
        if values:
            trainer.add_callback(EarlyStoppingCallback(**values))

    def write_history(self, state: TrainerState) -> None:
        """Write log_history.json and curves.png."""
        if self._writes:
            history = [
                {k: v if math.isfinite(v) else None for k, v in entry.items()}
                for entry in state.log_history
            ]
            write_json(self.directory / "log_history.json", history)
            draw_curves(history, self.directory / "curves.png")


@contextmanager
def open_run(recipe: Recipe, argv: list[str], *, resuming: bool, **record: Any) -> Iterator[Run]:
    """The run of a recipe, its directory made and its record begun.

    Everything must have been checked before: this is where writing begins. An exception inside
    the block leaves `status` as failed (or interrupted, for Ctrl-C) in run.json.

    Args:
        recipe: the resolved recipe.
        argv: the command line.
        resuming: whether the directory holds an earlier part of this run.
        **record: further entries of run.json: base, data, batch.
    """
    directory = Path(recipe.train["output_dir"])
    wait_for_everyone()  # every process has seen the folder empty before the first one writes
    writes = os.environ.get("RANK", "0") == "0"
    entries = {
        "status": "running",
        "medft": medft_version(),
        "argv": masked_words(argv),
        "started": now(),
        "recipe": recipe.model_dump(),
        "seed": recipe.train["seed"],
        "packages": package_versions(),
        "hardware": hardware(),
        **record,
    }
    run = Run(directory, entries, writes=writes)
    if writes:
        directory.mkdir(parents=True, exist_ok=True)
        if resuming:
            earlier = read_record(directory)
            entries |= {k: earlier[k] for k in ("started", "init_from") if k in earlier}
            entries["resumed"] = [*earlier.get("resumed", []), now()]
        sections = masked(recipe.model_dump())
        sections["train"].pop("resume_from_checkpoint", None)  # so that it can be run again
        recipe_text = dump_sections(sections)
        (directory / "recipe.yaml").write_text(recipe_text, encoding="utf-8")
    run.note()
    try:
        yield run
    except BaseException as error:
        if run.record["status"] == "running":
            stopped = isinstance(error, KeyboardInterrupt)
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            run.note(status="interrupted" if stopped else "failed", error=reason, ended=now())
        raise


def save_result(trainer: Trainer, folder: Path) -> None:
    """Write the trained weights, the processor and medft.json as one complete folder."""
    wait_for_everyone()
    if not trainer.args.should_save:
        trainer.save_model(str(folder), _internal_call=True)
        return
    with complete_folder(folder) as draft:
        trainer.save_model(str(draft), _internal_call=True)
        adapter = draft / WEIGHTS_FILE
        if adapter.is_file():
            refuse_inert(load_file(adapter))
        (draft / "training_args.bin").unlink(missing_ok=True)  # a pickle, never read by medft


def final_metrics(log_history: list[dict[str, float]]) -> dict[str, float]:
    """The last logged training loss and the figures of the last evaluation."""
    losses = [entry["loss"] for entry in log_history if "loss" in entry]
    evaluations = [entry for entry in log_history if "eval_loss" in entry]
    metrics = {"loss": losses[-1]} if losses else {}
    if evaluations:
        metrics |= {key: value for key, value in evaluations[-1].items() if key.startswith("eval_")}
    return metrics


def draw_curves(log_history: list[dict[str, float]], path: Path) -> None:
    """Draw loss, validation loss, learning rate and gradient norm over the steps as a PNG."""
    from matplotlib.figure import Figure

    panels = [("loss", "eval_loss"), ("learning_rate",), ("grad_norm",)]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, names in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for name in names:
            points = [(e["step"], e[name]) for e in log_history if e.get(name) is not None]
            if points:
                marker = "o" if name.startswith("eval_") or len(points) == 1 else None
                axes.plot(*zip(*points, strict=True), label=name, marker=marker)
        axes.set_title(names[0].replace("_", " "))
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend()
    figure.savefig(path, dpi=100)


def _count(parameters: Any) -> int:
    # a 4-bit parameter packs two weights a byte; a ZeRO-3 one is empty here and knows its size
    return sum(
        getattr(p, "ds_numel", p.numel()) * (2 if type(p).__name__ == "Params4bit" else 1)
        for p in parameters
    )
