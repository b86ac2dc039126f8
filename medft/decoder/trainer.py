"""TRL's SFTTrainer, corrected for image-text decoders.

The adapter stays in float32 (TRL casts it to bfloat16 on a 4-bit base), labels come from medft's
collator, and the validation loss is total negative log-likelihood over total supervised tokens,
whatever the batch size and the number of processes.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel
from trl import SFTConfig, SFTTrainer

from medft.compat import gather_last_batch_whole, score_labels
from medft.config.train_keys import TrainSection
from medft.decoder.prepared import PreparedDecoderData
from medft.models.saved import SavedRecord
from medft.training.arguments import training_arguments
from medft.training.callbacks import FirstValidationCallback, SetEpochCallback
from medft.training.trainer import RowTrackingTrainer

METRICS = {"loss": False, "perplexity": False, "token_accuracy": True}
"""Metrics that may select best_model/, and whether higher is better."""


def decoder_arguments(train: TrainSection, *, dtype: str, **owned: Any) -> SFTConfig:
    """The arguments of a DecoderTrainer; the collator truncates rows, TRL does not.

    Raises:
        RecipeError: as from `training_arguments`.
    """
    return training_arguments(
        SFTConfig, train, dtype=dtype, metrics=METRICS, max_length=None, **owned
    )


class DecoderTrainer(RowTrackingTrainer, SFTTrainer):
    """Trains an adapter, or all weights, of an image-text decoder."""

    def __init__(
        self,
        model: PreTrainedModel,
        args: SFTConfig,
        prepared: PreparedDecoderData,
        record: SavedRecord,
    ) -> None:
        """Make the trainer.

        Args:
            model: from `medft.decoder.build`, its adapter attached and its tower installed.
            args: from `decoder_arguments`.
            prepared: from `prepare_decoder_data`.
            record: written beside every saved adapter or model.
        """
        float32 = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(
            model=model,
            args=args,
            data_collator=prepared.collator,
            train_dataset=prepared.train,
            eval_dataset=prepared.validation,
            processing_class=prepared.processor,
            compute_metrics=_validation_metrics,
        )
        self.add_callback(SetEpochCallback(prepared.sampler.set_epoch))
        if prepared.validation is not None:
            self.add_callback(FirstValidationCallback(self.compute_validation_batch))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = float32[name].to(parameter.device)
        self._record = record
        self._sampler = prepared.sampler

    def get_train_dataloader(self) -> DataLoader:
        """The batches of the sampler; Trainer would cut rows by count, past a short batch.

        Each process logs one sum of tokens, of which none is cut from the last batch of an epoch.
        """
        loader = self.accelerator.prepare(
            DataLoader(
                self.train_dataset,
                batch_sampler=self._sampler,
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
                pin_memory=self.args.dataloader_pin_memory,
                persistent_workers=self.args.dataloader_persistent_workers,
                prefetch_factor=self.args.dataloader_prefetch_factor,
            )
        )
        gather_last_batch_whole(loader)
        return loader

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """Sums over the supervised tokens of each row, which `_validation_metrics` adds up.

        Returns:
            None, negative log-likelihood and correct tokens [B, 2], and supervised tokens [B].
        """
        with torch.no_grad(), self.compute_loss_context_manager():
            scores = score_labels(model, self.to_device(inputs))
        nll = -scores.log_probs.float().sum(dim=1)
        correct = scores.is_top1.float().sum(dim=1)
        return None, torch.stack([nll, correct], dim=1), scores.is_supervised.sum(dim=1)

    def compute_validation_batch(self) -> None:
        """Compute the first validation batch as an evaluation does, and drop what comes out."""
        size = min(self.args.per_device_eval_batch_size, len(self.eval_dataset))
        batch = self.data_collator([self.eval_dataset[index] for index in range(size)])
        self.model_wrapped.eval()
        self.prediction_step(self.model_wrapped, batch, prediction_loss_only=False)
        self.model_wrapped.train()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the training perplexity."""
        if "loss" in logs:
            logs["perplexity"] = _perplexity(logs["loss"])
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing; TRL would put its own model card into the run directory."""

    def saved(self, folder: Path) -> None:
        """Write the record beside the weights."""
        self._record.write(folder)


def _validation_metrics(prediction: EvalPrediction) -> dict[str, float]:
    nll, correct = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    tokens = int(np.asarray(prediction.label_ids).sum())
    loss = nll / tokens
    return {
        "loss": loss,
        "perplexity": _perplexity(loss),
        "token_accuracy": correct / tokens,
        "supervised_tokens": tokens,
    }


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # the exponential of more overflows a float
