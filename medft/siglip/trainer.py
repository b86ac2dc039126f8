"""A contrastive trainer on transformers.Trainer: loop, precision and checkpoints are Trainer's.

With `exact_batch` every pair of the effective batch is compared with every other, whatever the
accumulation and the number of processes. The loss is taken in float32 on normalised embeddings;
scale and bias have their own parameter group without weight decay; validation sees the whole split
as one batch.
"""

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, RandomSampler, Sampler
from transformers import EvalPrediction, TrainingArguments

from medft.config.recipe import ContrastiveSection
from medft.metrics.retrieval import (
    RECALLS,
    WAYS,
    chance_recalls,
    ranks_both_ways,
    retrieval_scorers,
)
from medft.models.lora import write_notes
from medft.siglip.exact_batch import Share, random_numbers_again, share_out
from medft.siglip.locked_towers import LockedTowers
from medft.siglip.loss import (
    Gradients,
    Pairs,
    loss_alone,
    loss_gradients,
    mean_logits,
    unit,
)
from medft.siglip.model import (
    embed,
    restore_scale_and_bias,
    scale_and_bias,
    scale_and_bias_notes,
)
from medft.siglip.prepared import SiglipInputs
from medft.training.arguments import training_arguments
from medft.training.callbacks import EpochTeller, MeasuredBatches

logger = logging.getLogger(__name__)

METRICS = {
    "loss": False,
    **{f"{way}_recall@{k}": True for way in WAYS for k in RECALLS},
    **{f"{way}_median_rank": False for way in WAYS},
}
"""Figures that may choose best_model/, and whether more is better."""


def siglip_arguments(train: dict[str, Any], *, dtype: str, **owned: Any) -> TrainingArguments:
    """The arguments of a SiglipTrainer.

    Raises:
        RecipeError: as from `training_arguments`.
    """
    return training_arguments(TrainingArguments, train, dtype=dtype, metrics=METRICS, **owned)


class SiglipTrainer(MeasuredBatches):
    """Trains an adapter, or all weights, of a SigLIP."""

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        inputs: SiglipInputs,
        contrastive: ContrastiveSection,
        notes: dict[str, Any],
    ) -> None:
        """Make the trainer.

        Args:
            model: with its adapter attached, scale and bias trainable.
            args: from `medft.training.arguments.training_arguments`.
            inputs: from `prepare_inputs`.
            contrastive: the recipe's section.
            notes: content of medft.json beside every saved adapter, but for scale and bias.
        """
        self._locked = LockedTowers(model)
        logger.info("without backward pass: %s", ", ".join(self._locked.parts) or "nothing")
        super().__init__(
            model=model,
            args=args,
            data_collator=inputs.collator,
            train_dataset=inputs.train,
            eval_dataset=inputs.validation,
            processing_class=inputs.processor,
            compute_metrics=self._validation_metrics,
        )
        self.model_accepts_loss_kwargs = False  # a mean over pairs: Trainer divides by the steps
        self.add_callback(EpochTeller(inputs.train.set_epoch))
        self._contrastive = contrastive
        self._plan = inputs.batches
        self._pairs_an_epoch = inputs.rows_per_epoch
        self._notes = notes
        self._micro_batches: list[dict[str, Tensor]] = []
        self._shares: list[Share] = []
        self._compared: Pairs | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss of the batch that the micro-batch belongs to, with the micro-batch's gradient.

        Raises:
            RunError: its embeddings are others than when the batch's loss was taken.
        """
        if self._micro_batches:
            self._shares = self._share_out(self._first_pass())
        pairs = _pairs(model, inputs)
        if not self._shares:
            self._shares = self._share_out([pairs])
        share = self._shares.pop(0)
        loss = share.loss_of(pairs.images, pairs.texts, *scale_and_bias(self.model))
        return (loss, {}) if return_outputs else loss

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """The micro-batches of a step, kept where they are one exact batch."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        is_one = self._contrastive.exact_batch and len(batches) > 1
        self._micro_batches, self._shares = batches if is_one else [], []
        return batches, items

    def _first_pass(self) -> list[Pairs]:
        """The step's embeddings without grad; the random numbers drawn for them come again."""
        # not before the first micro-batch: until then a resumed run restores its random state
        batches, self._micro_batches = self._micro_batches, []
        with (
            random_numbers_again(self.args.device),
            self._locked.first_pass(),
            torch.no_grad(),
        ):
            return [_pairs(self.model, self._prepare_inputs(batch)) for batch in batches]

    def _share_out(self, parts: list[Pairs]) -> list[Share]:
        exact = self._contrastive.exact_batch
        return share_out(
            parts,
            self._gradients_of,
            across_processes=exact,
            divided_by=len(parts) if exact else 1,
        )

    def _gradients_of(self, pairs: Pairs) -> Gradients:
        self._compared = pairs
        chosen = self._contrastive
        return loss_gradients(chosen.loss, pairs, chosen.positives, *scale_and_bias(self.model))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        # as the library's, but for the last batch of an epoch that would be smaller
        return RandomSampler(self.train_dataset, num_samples=self._pairs_an_epoch)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The library's optimizer, with scale and bias in a group of their own."""
        own = [p for p in scale_and_bias(self.model if model is None else model) if p.requires_grad]
        if self.optimizer is not None:
            return self.optimizer
        for parameter in own:
            parameter.requires_grad_(False)
        try:
            super().create_optimizer(model)
        finally:
            for parameter in own:
                parameter.requires_grad_(True)
        learning_rate = self.args.learning_rate * self._contrastive.scale_lr
        self.optimizer.add_param_group({"params": own, "lr": learning_rate, "weight_decay": 0.0})
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add how far the loss is above its floor, scale, bias and the last batch's logits."""
        if "loss" in logs and self._compared is not None:
            logs.update(_above(self._plan.loss_floor, logs["loss"]))
            scale, bias = scale_and_bias(self.model)
            logs["scale"], logs["bias"] = scale.exp().item(), bias.item()
            logs.update(self._mean_logits(self._compared))
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Embeddings of the batch, for `_validation_metrics` to compare across batches.

        Returns:
            None, embeddings of images and of texts [B, D], and input_ids [B, S] with groups [B].
        """
        with torch.no_grad(), self.compute_loss_context_manager():
            pairs = _pairs(model, self._prepare_inputs(inputs))
        return None, (pairs.images.float(), pairs.texts.float()), (pairs.input_ids, pairs.group_ids)

    def _validation_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The loss of all pairs as one batch, where the matches stand, and what chance would give.

        Raises:
            DataError: an embedding is no number.
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

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            notes = {**self._notes, **scale_and_bias_notes(self.model)}
            write_notes(Path(output_dir or self.args.output_dir), notes)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        restore_scale_and_bias(self.model if model is None else model, Path(resume_from_checkpoint))


def _pairs(model: nn.Module, inputs: dict[str, Tensor]) -> Pairs:
    """The embeddings of a micro-batch, as the towers give them."""
    images, texts = embed(model, inputs["input_ids"], inputs["pixel_values"])
    return Pairs(images, texts, inputs["input_ids"], inputs["group_ids"])


def _above(floor: float | None, loss: float) -> dict[str, float]:
    return {} if floor is None else {"floor": floor, "excess": loss - floor}


def _retrieval(pairs: Pairs) -> dict[str, float]:
    """Recalls and median ranks among all pairs, texts with the same tokens being all right."""
    keys = torch.unique(pairs.input_ids, dim=0, return_inverse=True)[1].numpy()
    found = ranks_both_ways(unit(pairs.images).numpy(), unit(pairs.texts).numpy(), keys)
    weights = np.ones(len(keys))
    figures = {name: scorer.score(weights) for name, scorer in retrieval_scorers(found).items()}
    chance = chance_recalls(np.bincount(keys)[keys], len(keys))
    return {**figures, **{f"chance_{k}": v for k, v in chance.items()}, "pool": len(keys)}
