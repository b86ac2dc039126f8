"""Which evaluation best_model/ is of, kept beside its weights, so that both always agree.

A run that goes on from a checkpoint may find a best_model/ of an evaluation after it. Trainer knows
nothing of that one: a worse model could take its place, or none, with the metric of an earlier one.
"""

from pathlib import Path
from typing import Annotated, Any

from accelerate.utils import broadcast_object_list
from pydantic import BaseModel, ConfigDict, Field
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from medft.files import write_json
from medft.foreign import read_json

EVALUATION_FILE = "evaluation.json"


class BestEvaluation(BaseModel):
    """The evaluation whose model was the best so far."""

    model_config = ConfigDict(strict=True)

    step: Annotated[int, Field(ge=0)]
    metric: str
    """Its name in the log."""

    value: Annotated[float, Field(allow_inf_nan=False)]

    @classmethod
    def read(cls, folder: Path) -> "BestEvaluation | None":
        """The one of a best_model/; None if there is none, or an older medft wrote it."""
        try:
            return cls.model_validate(read_json(folder / EVALUATION_FILE))
        except (OSError, ValueError):
            return None

    @classmethod
    def last(cls, state: TrainerState, metric: str) -> "BestEvaluation":
        """The newest one in the log of a training."""
        entry = next(entry for entry in reversed(state.log_history) if metric in entry)
        return cls(step=state.global_step, metric=metric, value=entry[metric])

    def write(self, folder: Path) -> None:
        """Write it beside the weights."""
        write_json(folder / EVALUATION_FILE, self.model_dump())


def metric_name(arguments: TrainingArguments) -> str:
    """The name in the log of the metric that selects best_model/."""
    return f"eval_{(arguments.metric_for_best_model or 'loss').removeprefix('eval_')}"


class KnownBestCallback(TrainerCallback):
    """Lets later evaluations of a resumed run compare with the best_model/ that is there.

    Early stopping counts the evaluations that come again: there the checkpoint's own best stays.
    """

    def __init__(self, best_model: Path) -> None:
        self._best_model = best_model

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over its metric, if it is of an evaluation that the state does not know."""
        read = BestEvaluation.read(self._best_model) if args.process_index == 0 else None
        [best] = broadcast_object_list([read])
        if best and best.metric == metric_name(args) and best.step >= state.global_step > 0:
            state.best_metric, state.best_global_step = best.value, best.step


class SaveAfterEvaluationCallback(TrainerCallback):
    """Saves the last step of an epoch after the epoch's evaluation, where that is due.

    Trainer would save first, and a run that goes on from there never makes up for the evaluation.
    What else asks for a save must stand before this callback.
    """

    def __init__(self) -> None:
        self._is_due = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the save off."""
        is_last = float(state.epoch or 0).is_integer() or state.global_step >= state.max_steps
        if control.should_save and is_last and args.eval_strategy == "epoch":
            control.should_save, self._is_due = False, True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save now, which comes after the evaluation."""
        control.should_save = control.should_save or self._is_due
        self._is_due = False
