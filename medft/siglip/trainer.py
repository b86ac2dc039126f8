"""A contrastive trainer on transformers.Trainer: loop, precision and checkpoints are Trainer's.

The loss is taken in float32 on normalised embeddings; scale and bias have their own parameter
group without weight decay; the validation loss sees the whole split as one batch.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, TrainingArguments

from medft.adapters import write_notes
from medft.arguments import training_arguments
from medft.callbacks import MeasuredBatches
from medft.recipe import ContrastiveSection
from medft.siglip.inputs import SiglipInputs
from medft.siglip.loss import LOSSES, match_labels
from medft.siglip.model import embed, restore_scale_and_bias, scale_and_bias, scale_and_bias_notes

METRICS = {"loss": False}
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
            args: from `medft.arguments.training_arguments`.
            inputs: from `prepare_inputs`.
            contrastive: the recipe's section.
            notes: content of medft.json beside every saved adapter, but for scale and bias.
        """
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
        self._contrastive = contrastive
        self._notes = notes

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The contrastive loss of the micro-batch."""
        images, texts = embed(model, inputs["input_ids"], inputs["pixel_values"])
        loss = self._loss(images, texts, inputs["input_ids"], inputs["group_ids"])
        return (loss, {}) if return_outputs else loss

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
        """Add scale and bias as they stand to what is logged of training."""
        if "loss" in logs:
            scale, bias = scale_and_bias(self.model)
            logs["scale"], logs["bias"] = scale.exp().item(), bias.item()
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
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            images, texts = embed(model, inputs["input_ids"], inputs["pixel_values"])
        return None, (images.float(), texts.float()), (inputs["input_ids"], inputs["group_ids"])

    def _validation_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        images, texts = (torch.as_tensor(part) for part in prediction.predictions)
        input_ids, group_ids = (torch.as_tensor(part) for part in prediction.label_ids)
        with torch.no_grad():
            loss = self._loss(images, texts, input_ids, group_ids)
        return {"loss": loss.item(), "pairs": len(images)}

    def _loss(self, images: Tensor, texts: Tensor, input_ids: Tensor, group_ids: Tensor) -> Tensor:
        labels = match_labels(input_ids, group_ids, self._contrastive.positives)
        scale, bias = (parameter.to(images.device) for parameter in scale_and_bias(self.model))
        return LOSSES[self._contrastive.loss](images, texts, labels, scale, bias)

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
