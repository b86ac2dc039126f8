"""A contrastive trainer on transformers.Trainer: loop, precision and checkpoints are Trainer's.

With `exact_batch` every pair of the effective batch is compared with every other, whatever the
accumulation and the number of processes. The loss is computed in float32 on normalized embeddings;
scale and bias have their own parameter group without weight decay; validation compares the entire
split as one batch.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler, Sampler
from transformers import EvalPrediction, TrainingArguments

from medft.config.recipe import ContrastiveSection
from medft.config.train_keys import TrainSection
from medft.metrics.retrieval import (
    RECALLS,
    WAYS,
    chance_recalls,
    ranks_both_ways,
    retrieval_scorers,
)
from medft.models.saved import SavedRecord
from medft.siglip.exact_batch import ExactBatch, MicroBatch, replay_rng
from medft.siglip.locked_towers import LockedTowers
from medft.siglip.loss import (
    Gradients,
    Pairs,
    loss_alone,
    loss_gradients,
    mean_logits,
    unit,
)
from medft.siglip.model import embed, restore_scale_and_bias, scale_and_bias, scale_and_bias_record
from medft.siglip.prepared import PreparedSiglipData
from medft.training.arguments import training_arguments
from medft.training.callbacks import SetEpochCallback
from medft.training.trainer import RowTrackingTrainer

logger = logging.getLogger(__name__)

EXACT_BATCH = "exact_batch"
"""Batch key of a micro-batch's ExactBatch and index in it, never passed to the model."""

METRICS = {
    "loss": False,
    **{f"{way}_recall@{k}": True for way in WAYS for k in RECALLS},
    **{f"{way}_median_rank": False for way in WAYS},
}
"""Metrics that may select best_model/, and whether higher is better."""


def siglip_arguments(train: TrainSection, *, dtype: str, **owned: Any) -> TrainingArguments:
    """The arguments of a SiglipTrainer.

    Raises:
        RecipeError: as from `training_arguments`.
    """
    return training_arguments(TrainingArguments, train, dtype=dtype, metrics=METRICS, **owned)


class SiglipTrainer(RowTrackingTrainer):
    """Trains an adapter, or all weights, of a SigLIP."""

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        prepared: PreparedSiglipData,
        contrastive: ContrastiveSection,
        record: SavedRecord,
    ) -> None:
        """Make the trainer.

        Args:
            model: with its adapter attached, scale and bias trainable.
            args: from `siglip_arguments`.
            prepared: from `prepare_siglip_data`.
            contrastive: the recipe's section.
            record: written beside every saved adapter or model, scale and bias added.
        """
        self._locked = LockedTowers(model)
        if self._locked.parts:
            logger.info("frozen, without backward pass: %s", ", ".join(self._locked.parts))
        super().__init__(
            model=model,
            args=args,
            data_collator=prepared.collator,
            train_dataset=prepared.train,
            eval_dataset=prepared.validation,
            processing_class=prepared.processor,
            compute_metrics=self._validation_metrics,
        )
        self.model_accepts_loss_kwargs = False  # a mean over pairs: Trainer divides by the steps
        self.add_callback(SetEpochCallback(prepared.train.set_epoch))
        self._contrastive = contrastive
        self._plan = prepared.batches
        self._pairs_an_epoch = prepared.rows_per_epoch
        self._record = record
        self._compared: ExactBatch | None = None
        """The batch of the last loss, for the log."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The batch loss, whose backward pass gives the micro-batch's part of the gradient.

        Raises:
            RunError: the micro-batch's embeddings differ from those of the caching pass.
        """
        batch, index = inputs.pop(EXACT_BATCH)
        batch.run_caching_pass()
        pairs = _pairs(model, inputs)
        cached = batch.cached(index, pairs)
        self._compared = batch
        loss = cached.loss_of(pairs.images, pairs.texts, *scale_and_bias(self.model))
        return (loss, {}) if return_outputs else loss

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """The micro-batches of a step, each with its ExactBatch and its index in it."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._contrastive.exact_batch:
            whole = self._exact_batch(batches, across_processes=True)
            places = [(whole, index) for index in range(len(batches))]
        else:
            places = [(self._exact_batch([b], across_processes=False), 0) for b in batches]
        return [
            {**batch, EXACT_BATCH: place} for batch, place in zip(batches, places, strict=True)
        ], items

    def _exact_batch(
        self, micro_batches: list[dict[str, Any]], *, across_processes: bool
    ) -> ExactBatch:
        return ExactBatch(
            micro_batches,
            embed_without_grad=self._embed_without_grad,
            gradients_of=self._gradients_of,
            across_processes=across_processes,
        )

    def _embed_without_grad(self, batches: Sequence[MicroBatch]) -> list[Pairs]:
        with (
            replay_rng(self.args.device),
            self._locked.caching_pass(),
            torch.no_grad(),
        ):
            return [_pairs(self.model, self.to_device(dict(batch))) for batch in batches]

    def _gradients_of(self, pairs: Pairs) -> Gradients:
        chosen = self._contrastive
        return loss_gradients(chosen.loss, pairs, chosen.positives, *scale_and_bias(self.model))

    def train_sampler(self) -> Sampler:
        """A random order, as the library's, without a smaller last batch of the epoch."""
        return RandomSampler(self.train_dataset, num_samples=self._pairs_an_epoch)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The library's optimizer, with scale and bias in a parameter group of their own."""
        own = [p for p in scale_and_bias(self.model if model is None else model) if p.requires_grad]
        if self.optimizer is not None:
            return self.optimizer
        for parameter in own:
            parameter.requires_grad_(False)
        try:
            optimizer = super().create_optimizer(model)
        finally:
            for parameter in own:
                parameter.requires_grad_(True)
        learning_rate = self.args.learning_rate * self._contrastive.scale_lr
        optimizer.add_param_group({"params": own, "lr": learning_rate, "weight_decay": 0.0})
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss's floor and excess, scale, bias and the last batch's mean logits."""
        if "loss" in logs and self._compared is not None and self._compared.pairs is not None:
            logs.update(_above(self._plan.loss_floor, logs["loss"]))
            scale, bias = scale_and_bias(self.model)
            logs["scale"], logs["bias"] = scale.exp().item(), bias.item()
            logs.update(self._mean_logits(self._compared.pairs))
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Embeddings of the batch, which `_validation_metrics` compares across batches.

        Returns:
            None, embeddings of images and of texts [B, D], and input_ids [B, S] with groups [B].
        """
        with torch.no_grad(), self.compute_loss_context_manager():
            pairs = _pairs(model, self.to_device(inputs))
        return None, (pairs.images.float(), pairs.texts.float()), (pairs.input_ids, pairs.group_ids)

    def _validation_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The loss of all pairs as one batch, retrieval metrics, and the recalls of chance.

        Raises:
            DataError: an embedding is NaN or infinite.
        """
        arrays = (*prediction.predictions, *prediction.label_ids)
        pairs = Pairs(*(torch.as_tensor(array) for array in arrays))
        chosen = self._contrastive
        own = (parameter.to(pairs.images.device) for parameter in scale_and_bias(self.model))
        loss = loss_alone(chosen.loss, pairs, chosen.positives, *own).item()
        floor = self._plan.validation_loss_floor
        figures = {"loss": loss, **_above(floor, loss), **self._mean_logits(pairs)}
        return figures | _retrieval(pairs)

    def _mean_logits(self, pairs: Pairs) -> dict[str, float]:
        own = (parameter.to(pairs.images.device) for parameter in scale_and_bias(self.model))
        means = mean_logits(pairs, self._contrastive.positives, *own)
        named = zip(("positive_logit", "negative_logit"), (m.item() for m in means), strict=True)
        return {name: mean for name, mean in named if not math.isnan(mean)}

    def saved(self, folder: Path) -> None:
        """Write the record, scale and bias in it, beside the weights."""
        self._record.model_copy(update=scale_and_bias_record(self.model)).write(folder)

    def restored(self, folder: Path, model: nn.Module) -> None:
        """Restore scale and bias, which the adapter's file lacks."""
        restore_scale_and_bias(model, SavedRecord.read(folder))


def _pairs(model: nn.Module, inputs: dict[str, Tensor]) -> Pairs:
    """The embeddings of a micro-batch, as the towers return them."""
    images, texts = embed(model, inputs["input_ids"], inputs["pixel_values"])
    return Pairs(images, texts, inputs["input_ids"], inputs["group_ids"])


def _above(floor: float | None, loss: float) -> dict[str, float]:
    return {} if floor is None else {"floor": floor, "excess": loss - floor}


def _retrieval(pairs: Pairs) -> dict[str, float]:
    """Recalls and median ranks among all pairs; texts with the same tokens all count as matches."""
    keys = torch.unique(pairs.input_ids, dim=0, return_inverse=True)[1].numpy()
    found = ranks_both_ways(unit(pairs.images).numpy(), unit(pairs.texts).numpy(), keys)
    weights = np.ones(len(keys))
    figures = {name: scorer.score(weights) for name, scorer in retrieval_scorers(found).items()}
    chance = chance_recalls(np.bincount(keys)[keys], len(keys))
    return {**figures, **{f"chance_{k}": v for k, v in chance.items()}, "pool": len(keys)}
