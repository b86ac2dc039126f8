"""Tables of recipe keys: what `train` takes and refuses, and what other tools call things."""

from typing import Annotated, Any, Literal

from pydantic import Field

# Names of TRL scripts, LLaMA-Factory, axolotl, unsloth, ms-swift and open_clip.
FOREIGN_KEYS = {
    "accum_freq": "train.gradient_accumulation_steps",
    "adapter_name_or_path": "model.base",
    "base_model": "model.base",
    "batch_size": "train.per_device_train_batch_size",
    "bnb_4bit_compute_dtype": "model.dtype",
    "bnb_4bit_quant_type": "quantization.type",
    "bnb_4bit_use_double_quant": "quantization.double_quant",
    "cutoff_len": "data.max_length",
    "dataset": "data.train",
    "dataset_path": "data.train",
    "datasets": "data.train",
    "double_quantization": "quantization.double_quant",
    "epochs": "train.num_train_epochs",
    "eval_batch_size": "train.per_device_eval_batch_size",
    "eval_dataset": "data.validation",
    "finetuning_type": "lora (null: full fine-tuning)",
    "force_image_size": "data.image_size",
    "grad_accum": "train.gradient_accumulation_steps",
    "gradient_clipping": "train.max_grad_norm",
    "image_resolution": "data.image_size",
    "load_in_4bit": "quantization.bits",
    "load_in_8bit": "quantization.bits",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_target": "lora.targets",
    "lora_target_linear": "lora.targets",
    "lora_target_modules": "lora.targets",
    "lr": "train.learning_rate",
    "max_completion_length": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_pixels": "data.max_image_tiles",
    "micro_batch_size": "train.per_device_train_batch_size",
    "mixed_precision": "model.dtype",
    "model_id": "model.base",
    "model_name": "model.base",
    "model_name_or_path": "model.base",
    "num_epochs": "train.num_train_epochs",
    "output": "train.output_dir",
    "per_gpu_train_batch_size": "train.per_device_train_batch_size",
    "precision": "model.dtype",
    "quant_bits": "quantization.bits",
    "quantization_bit": "quantization.bits",
    "rank": "lora.r",
    "resume": "train.resume_from_checkpoint",
    "save_dir": "train.output_dir",
    "sequence_len": "data.max_length",
    "target_modules": "lora.targets",
    "torch_dtype": "model.dtype",
    "train_file": "data.train",
    "val_data": "data.validation",
    "val_set_size": "data.validation",
    "val_size": "data.validation",
    "validation_file": "data.validation",
    "warmup": "train.warmup_steps",
    "warmup_ratio": "train.warmup_steps",
    "wd": "train.weight_decay",
}


_Count = Annotated[int, Field(ge=1)]


_Amount = Annotated[float, Field(ge=0)]


_Interval = Annotated[float, Field(gt=0)]


_Share = Annotated[float, Field(ge=0, lt=1)]


TRAIN_KEYS: dict[str, Any] = {
    "adam_beta1": _Share,
    "adam_beta2": _Share,
    "adam_epsilon": _Interval,
    "data_seed": Annotated[int, Field(ge=0)] | None,
    "dataloader_num_workers": Annotated[int, Field(ge=0)],
    "dataloader_persistent_workers": bool,
    "dataloader_pin_memory": bool,
    "dataloader_prefetch_factor": _Count | None,
    "ddp_backend": str | None,
    "ddp_bucket_cap_mb": _Count | None,
    "ddp_find_unused_parameters": bool | None,
    "ddp_timeout": _Count,
    "disable_tqdm": bool,
    "eval_accumulation_steps": _Count | None,
    "eval_delay": _Amount,
    "eval_on_start": bool,
    "eval_steps": _Interval | None,
    "eval_strategy": Literal["no", "steps", "epoch"],
    "gradient_accumulation_steps": _Count,
    "gradient_checkpointing": bool,
    "gradient_checkpointing_kwargs": dict[str, Any] | None,
    "learning_rate": _Amount,
    "logging_first_step": bool,
    "logging_steps": _Interval,
    "logging_strategy": Literal["no", "steps", "epoch"],
    "lr_scheduler_kwargs": dict[str, Any] | None,
    "lr_scheduler_type": str,
    "max_grad_norm": _Amount,
    "max_steps": Annotated[int, Field(ge=-1)],
    "metric_for_best_model": str,
    "num_train_epochs": _Interval,
    "optim": str,
    "per_device_eval_batch_size": _Count,
    "per_device_train_batch_size": _Count,
    "report_to": str | list[str],
    "resume_from_checkpoint": bool | str | None,
    "run_name": str | None,
    "save_steps": _Interval,
    "save_strategy": Literal["no", "steps", "epoch"],
    "save_total_limit": _Count | None,
    "seed": Annotated[int, Field(ge=0, lt=2**32)],
    "tf32": bool | None,
    "train_sampling_strategy": Literal["random", "group_by_length"],
    "torch_empty_cache_steps": _Count | None,
    "use_cpu": bool,
    "warmup_steps": _Amount,
    "weight_decay": _Amount,
}
"""Fields of TrainingArguments that a recipe may set, with what they take; output_dir aside.

A list of what is allowed: a field that a newer library brings is refused until it is known here.
"""


EARLY_STOPPING_KEYS: dict[str, Any] = {
    "early_stopping_patience": _Count,
    "early_stopping_threshold": _Amount,
}
"""What a recipe may set in `train` of transformers' EarlyStoppingCallback."""


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
    "dataloader_drop_last": "rows would be left out of training and validation: remove the key",
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
    "logging_nan_inf_filter": "medft never hides a loss that is no number: remove the key",
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
"""Why a field of the library's training arguments may not be set, where there is more to say than
that medft does not pass it on."""


TRAIN_DEFAULTS = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-8,
    "learning_rate": 2e-4,
    "logging_steps": 10,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 1.0,
    "report_to": "none",
    "save_steps": 500,
    "seed": 17,
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
}
"""medft's values for fields of TrainingArguments that a recipe leaves out."""
