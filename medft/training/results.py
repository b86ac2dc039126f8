"""What a training leaves: the trained weights as a complete folder, and its final metrics."""

from pathlib import Path

from safetensors.torch import load_file

from medft.files import complete_folder
from medft.models.adapter import refuse_inert
from medft.models.saved import WEIGHTS_FILE
from medft.training.best_model import BestEvaluation, metric_name
from medft.training.process import wait_for_everyone
from medft.training.trainer import RowTrackingTrainer


def save_best(trainer: RowTrackingTrainer, folder: Path) -> None:
    """Write what `save_result` does with the evaluation that has just been made beside it."""
    best = BestEvaluation.last(trainer.state, metric_name(trainer.args))
    save_result(trainer, folder, best)


def save_result(
    trainer: RowTrackingTrainer, folder: Path, evaluation: BestEvaluation | None = None
) -> None:
    """Write the trained weights, the processor and medft.json as one complete folder.

    Args:
        trainer: with the trained model.
        folder: that is replaced.
        evaluation: of these weights, to be written beside them.
    """
    wait_for_everyone()
    if not trainer.args.should_save:
        trainer.write_model(folder)
        return
    with complete_folder(folder) as draft:
        trainer.write_model(draft)
        if evaluation:
            evaluation.write(draft)
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
