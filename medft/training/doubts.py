"""Warnings of a training that runs, and will hardly do what its user hopes for."""

import logging
from typing import Any

from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

logger = logging.getLogger(__name__)

LARGE = 2 * 10**9
"""Weights of a base for which a CPU is too slow."""

_ENTRIES = 6
"""Log entries of an epoch at least, by whose losses it is judged."""


def warn_of_slow_device(weights: int, arguments: TrainingArguments) -> None:
    """Warn if a large base is going to be trained on a CPU.

    Args:
        weights: number of the base's.
        arguments: the trainer's.
    """
    if weights > LARGE and arguments.device.type == "cpu":
        logger.warning(
            "a base of %.1f billion weights is trained on the CPU, where a run takes days: torch "
            "finds no GPU, or train.use_cpu is true",
            weights / 1e9,
        )


class LossFallsCallback(TrainerCallback):
    """Warns after the first epoch if its loss has not fallen."""

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare the mean loss of the first and the last third of the epoch's log entries."""
        if state.epoch != 1:
            return
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        third = len(losses) // 3
        if len(losses) < _ENTRIES:
            return
        first, last = sum(losses[:third]) / third, sum(losses[-third:]) / third
        if last >= first:
            logger.warning(
                "the loss has not fallen in the first epoch, from %.4g to %.4g (means of the first "
                "and the last third): compare train.learning_rate, %g, with the shipped recipes', "
                "and look at what medft check shows between >>> and <<<, which is trained",
                first,
                last,
                args.learning_rate,
            )
