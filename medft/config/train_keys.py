"""The section `train`: fields of the library's training arguments that a recipe may set.

Allowed fields are listed: a field that a newer library adds is refused until it is listed here.
"""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    GetCoreSchemaHandler,
    SerializerFunctionWrapHandler,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_serializer,
)
from pydantic_core import CoreSchema

from medft.config.strict_yaml import PathText, Section


def _as_written(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """The value as written once it is valid: an int stays an int where a float is allowed."""
    check(value)
    return value


def _whole_or_fraction(steps: float) -> float:
    if steps > 1 and steps != int(steps):
        raise ValueError("a whole number of steps, or a fraction below 1")
    return steps


def _not_zero(steps: int) -> int:
    if steps == 0:  # Trainer would go by num_train_epochs
        raise ValueError("at least 1, or -1 to go by num_train_epochs")
    return steps


class _NotNull:
    """For `T | None`: a written value must be a T; None means that the key is not written."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return handler(source)["schema"]


_Count = Annotated[int, Field(ge=1, le=10**6)]
_Amount = Annotated[float, Field(ge=0, le=1e38), WrapValidator(_as_written)]
_Steps = Annotated[float, Field(ge=0, le=10**9), WrapValidator(_as_written)]
_Interval = Annotated[float, Field(gt=0, le=10**9), WrapValidator(_as_written)]
_Fraction = Annotated[float, Field(ge=0, lt=1), WrapValidator(_as_written)]
_Warmup = Annotated[float, AfterValidator(_whole_or_fraction), Field(ge=0, le=10**9)]
_MaxSteps = Annotated[int, AfterValidator(_not_zero), Field(ge=-1, le=10**9)]
_Workers = Annotated[int, Field(ge=0, le=1024)]
_When = Literal["no", "steps", "epoch"]


class TrainSection(Section):
    """Training arguments; a key that is not written has medft's default, or the library's."""

    output_dir: PathText
    """The run directory."""

    learning_rate: _Amount = 2e-4
    """Peak learning rate of the schedule; no unit."""

    lr_scheduler_type: str = "cosine"
    """Name of a learning-rate schedule in transformers."""

    lr_scheduler_kwargs: dict[str, Any] | None = None
    """Extra arguments of the schedule."""

    warmup_steps: Annotated[_Warmup, WrapValidator(_as_written)] = 0.1
    """Optimizer steps of rising learning rate; below 1: a fraction of all steps."""

    optim: Annotated[str | None, _NotNull()] = None
    """Name of an optimizer in transformers."""

    adam_beta1: _Fraction = 0.9
    """Decay rate of the first moment (mean of gradients) per step."""

    adam_beta2: _Fraction = 0.95
    """Decay rate of the second moment (mean of squared gradients) per step."""

    adam_epsilon: _Interval = 1e-8
    """Term added to the square root of the second moment."""

    weight_decay: _Amount = 0.01
    """Fraction of a weight that a step at learning rate 1 would remove."""

    max_grad_norm: _Amount = 1.0
    """Norm to which gradients are clipped; 0: no clipping."""

    num_train_epochs: Annotated[_Interval | None, _NotNull()] = None
    """Epochs: passes over the training rows."""

    max_steps: Annotated[_MaxSteps | None, _NotNull()] = None
    """Optimizer steps, instead of num_train_epochs; -1: go by these."""

    per_device_train_batch_size: Annotated[_Count | None, _NotNull()] = None
    """Rows per batch on each device."""

    gradient_accumulation_steps: Annotated[_Count | None, _NotNull()] = None
    """Batches per optimizer step on each device."""

    gradient_checkpointing: Annotated[bool | None, _NotNull()] = None
    """Recompute activations in the backward pass instead of storing them."""

    gradient_checkpointing_kwargs: dict[str, Any] | None = None
    """Arguments of torch's checkpoint function."""

    train_sampling_strategy: Annotated[Literal["random", "group_by_length"] | None, _NotNull()] = (
        None
    )
    """Order of rows: random, or group_by_length (rows of similar length in one batch)."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 17
    """Seed of initial weights, dropout and the order of rows."""

    data_seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    """Seed of the order of rows; default: seed."""

    eval_strategy: Annotated[_When | None, _NotNull()] = None
    """When validation rows are evaluated; default: after eval_steps if there are any."""

    eval_steps: _Interval | None = None
    """Optimizer steps between evaluations; below 1: a fraction of all steps; default: 0.1."""

    eval_delay: Annotated[_Steps | None, _NotNull()] = None
    """Optimizer steps or epochs before the first evaluation."""

    eval_on_start: Annotated[bool | None, _NotNull()] = None
    """Evaluate before the first optimizer step."""

    eval_accumulation_steps: _Count | None = None
    """Evaluation batches whose outputs stay on the device at once."""

    per_device_eval_batch_size: Annotated[_Count | None, _NotNull()] = None
    """Rows per evaluation batch on each device."""

    metric_for_best_model: Annotated[str | None, _NotNull()] = None
    """Metric that selects best_model/; default: eval_loss."""

    early_stopping_patience: Annotated[_Count | None, _NotNull()] = None
    """Evaluations without improvement after which training ends."""

    early_stopping_threshold: Annotated[_Amount | None, _NotNull()] = None
    """Change of metric_for_best_model that an improvement must exceed."""

    logging_strategy: Annotated[_When | None, _NotNull()] = None
    """When metrics are logged."""

    logging_steps: _Interval = 10
    """Optimizer steps between log entries; below 1: a fraction of all steps."""

    logging_first_step: Annotated[bool | None, _NotNull()] = None
    """Log the first optimizer step."""

    report_to: str | list[str] = "none"
    """Services that receive the log, as named in transformers."""

    run_name: str | None = None
    """Name of the run for these services."""

    disable_tqdm: Annotated[bool | None, _NotNull()] = None
    """Hide the progress bar; default: hidden outside a terminal."""

    save_strategy: Annotated[_When | None, _NotNull()] = None
    """When checkpoints are saved."""

    save_steps: _Interval = 0.1
    """Optimizer steps between checkpoints; below 1: a fraction of all steps."""

    save_total_limit: _Count | None = None
    """Checkpoints that are kept; null: all."""

    resume_from_checkpoint: bool | PathText | None = None
    """true: resume from the newest complete checkpoint of output_dir; auto: the same, or a fresh
    start if no run has saved there; or the path of one."""

    dataloader_num_workers: Annotated[_Workers | None, _NotNull()] = None
    """Worker processes that prepare batches; 0: the training process does."""

    dataloader_pin_memory: Annotated[bool | None, _NotNull()] = None
    """Put batches into pinned memory; default: true if there is an accelerator."""

    dataloader_prefetch_factor: _Count | None = None
    """Batches that each worker process prepares ahead."""

    ddp_backend: str | None = None
    """Backend of torch.distributed."""

    ddp_bucket_cap_mb: _Count | None = None
    """MiB of gradients in a DDP bucket, exchanged at once."""

    ddp_find_unused_parameters: bool | None = None
    """Search for parameters without gradient in each step (DDP)."""

    ddp_timeout: Annotated[Annotated[int, Field(ge=1, le=10**8)] | None, _NotNull()] = None
    """Seconds that a process waits for the other processes."""

    tf32: bool | None = None
    """Multiply float32 matrices in TF32 (10-bit mantissa) on NVIDIA GPUs."""

    torch_empty_cache_steps: _Count | None = None
    """Optimizer steps after which the device's memory cache is emptied."""

    use_cpu: Annotated[bool | None, _NotNull()] = None
    """Train on the CPU even if there is an accelerator."""

    @model_serializer(mode="wrap")
    def _resolved(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The written keys and medft's defaults, without those left to the library's defaults."""
        return {
            key: value
            for key, value in dump(self).items()
            if value is not None or key in self.model_fields_set
        }

    def early_stopping(self) -> dict[str, Any]:
        """Arguments of transformers' EarlyStoppingCallback; empty without early stopping."""
        return {k: v for k, v in self.model_dump().items() if k in EARLY_STOPPING_KEYS}

    def library_fields(self) -> dict[str, Any]:
        """The section's fields of TrainingArguments."""
        own = (*EARLY_STOPPING_KEYS, "resume_from_checkpoint")
        return {k: v for k, v in self.model_dump().items() if k not in own}


EARLY_STOPPING_KEYS = ("early_stopping_patience", "early_stopping_threshold")
"""Keys that are arguments of transformers' EarlyStoppingCallback."""


def train_refusal(key: str) -> str | None:
    """Why a key of `train` is refused; None if the library is not known to have it."""
    if key in REFUSED_TRAIN_KEYS:
        return REFUSED_TRAIN_KEYS[key].format(key=f"train.{key}")
    return "medft does not pass it on: remove the key" if key in _library_fields() else None


def _library_fields() -> set[str]:
    from trl import SFTConfig

    return {field.name for field in dataclasses.fields(SFTConfig)}


_PRECISION = "precision stands in model.dtype alone and {key} follows it: remove the key"
_LENGTH = "lengths belong to the data: write data.max_length"
_LABELS = "medft always trains the assistant's tokens and nothing else: remove the key"
_LAUNCHER = "it comes from the launcher: accelerate launch --config_file accelerate_configs/X.yaml"
_COLLATOR = "medft renders, cuts and pads rows itself: remove the key"
_PACKING = "packing mixes rows, and images with the wrong text: remove the key"

REFUSED_TRAIN_KEYS = {
    "activation_checkpointing": "write gradient_checkpointing, which every supported version reads",
    "activation_checkpointing_kwargs": "write gradient_checkpointing_kwargs",
    "assistant_only_loss": _LABELS,
    "auto_find_batch_size": "it changes the effective batch unseen: set the batch size yourself",
    "bf16": _PRECISION,
    "bf16_full_eval": _PRECISION,
    "chat_template_path": "another template changes what is trained: put it into the base's folder",
    "completion_only_loss": _LABELS,
    "dataloader_drop_last": "rows would be dropped from training and validation: remove the key",
    "dataloader_persistent_workers": "workers that live on change later epochs' random numbers, so "
    "that a resumed run would differ: remove the key",
    "dataset_kwargs": _COLLATOR,
    "dataset_num_proc": _COLLATOR,
    "dataset_text_field": _COLLATOR,
    "deepspeed": _LAUNCHER,
    "do_eval": "evaluation happens when data.validation is given: remove the key",
    "do_predict": "a recipe script trains: remove the key",
    "do_train": "a recipe script trains: remove the key",
    "eos_token": "another end token changes what is trained: put it into the base's folder",
    "eval_packing": _PACKING,
    "fp16": _PRECISION,
    "fp16_full_eval": _PRECISION,
    "fsdp": _LAUNCHER,
    "fsdp_config": _LAUNCHER,
    "greater_is_better": "medft knows it of each of its metrics: remove the key",
    "ignore_data_skip": "a resumed run would see rows twice: remove the key",
    "label_names": "medft owns the labels: remove the key",
    "label_smoothing_factor": "medft trains the plain loss: remove the key",
    "load_best_model_at_end": "best_model/ is written at every better evaluation: remove the key",
    "logging_nan_inf_filter": "medft never hides a loss that is NaN or infinite: remove the key",
    "loss_type": "medft trains the negative log-likelihood: remove the key",
    "max_length": _LENGTH,
    "max_seq_length": _LENGTH,
    "model_init_kwargs": "the base is described in the section model: remove the key",
    "packing": _PACKING,
    "packing_strategy": _PACKING,
    "pad_to_multiple_of": _COLLATOR,
    "padding_free": "Mllama's cross-attention needs padded rows: remove the key",
    "push_to_hub": "medft writes local folders, upload them with the hub's tool: remove it",
    "remove_unused_columns": "it would drop images and ids: remove the key",
    "save_only_model": "such a checkpoint cannot be resumed exactly: remove the key",
    "shuffle_dataset": "rows are drawn in a new order every epoch anyway: remove the key",
    "truncation_mode": _COLLATOR,
    "trust_remote_code": "medft runs no code from a model folder: remove the key",
    "use_liger_kernel": "Liger's fused loss reads a field Mllama lacks: remove the key",
}
"""Reasons for refusing fields of the library's training arguments, where there is more to say than
that medft does not pass them on."""
