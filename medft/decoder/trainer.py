"""TRL's SFTTrainer with what it gets wrong for this use put right.

The adapter stays in float32 (TRL casts it to bfloat16 on a 4-bit base), labels come from medft's
collator, and the validation loss is total negative log-likelihood over total supervised tokens,
whatever the batch size and the number of processes.
"""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Sampler
from transformers import (
    EvalPrediction,
    PreTrainedModel,
)
from trl import SFTConfig, SFTTrainer

from medft.config.train_keys import TrainSection
from medft.decoder.frozen_tower import install_image_hook, run_frozen_parts_without_grad
from medft.decoder.prepared import PreparedDecoderData
from medft.models.saved import write_saved_record
from medft.training.arguments import training_arguments
from medft.training.callbacks import SetEpochCallback
from medft.training.trainer import RowTrackingTrainer

logger = logging.getLogger(__name__)

METRICS = {"loss": False, "perplexity": False, "token_accuracy": True}
"""Figures that may choose best_model/, and whether more is better."""


def decoder_arguments(train: TrainSection, *, dtype: str, **owned: Any) -> SFTConfig:
    """The arguments of a DecoderTrainer; TRL's own cutting is off, the collator cuts.

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
        record: dict[str, Any],
    ) -> None:
        """Make the trainer.

        Args:
            model: with its adapter attached.
            args: from `medft.training.arguments.training_arguments`.
            prepared: from `prepare_decoder_data`.
            record: content of medft.json beside every saved adapter.
        """
        args.train_sampling_strategy = "random"  # ours groups, Trainer's knows no length
        float32 = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        frozen = run_frozen_parts_without_grad(base, prepared.family)
        logger.info("without backward pass: %s", ", ".join(frozen) or "nothing")
        cache = prepared.collator.cache = prepared.open_cache(base)
        fixed = prepared.model.cross_attention_fix
        install_image_hook(base, prepared.family, drops_padding_tiles=fixed, cache=cache)
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
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = float32[name].to(parameter.device)
        self._record = record
        self._sampler = prepared.sampler

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        return self._sampler

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """Sums over the supervised tokens of each row, for `_validation_metrics` to add up.

        Returns:
            None, negative log-likelihood and correct tokens [B, 2], and supervised tokens [B].
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        nll = -outputs.log_probs.float().sum(dim=1)
        correct = outputs.is_top1.float().sum(dim=1)
        return None, torch.stack([nll, correct], dim=1), outputs.label_mask.sum(dim=1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the perplexity to what is logged of training."""
        if "loss" in logs:
            logs["perplexity"] = _perplexity(logs["loss"])
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: TRL would write a page about itself into the run directory."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            write_saved_record(Path(output_dir or self.args.output_dir), self._record)


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
    return math.exp(min(loss, 700.0))  # beyond, a float overflows
