"""Advice for unknown recipe keys: what to write instead."""

import difflib
from collections.abc import Mapping, Sequence

KeyPath = tuple[str, ...]
"""A section, or a section and a key of it."""

# Key names of TRL scripts, LLaMA-Factory, axolotl, unsloth, ms-swift and open_clip.
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


def right_key(
    keys: KeyPath, known: Sequence[KeyPath], of_others: Mapping[str, Sequence[KeyPath]]
) -> str:
    """Advice for an unknown key: the equivalent of another tool's key, else the nearest key.

    Args:
        keys: the section and the key, as they were written.
        known: key paths of this type of recipe.
        of_others: key paths of the other types, by name.
    """
    key = keys[-1]
    if keys == ("quantization",):
        return "SigLIP is not trained on a 4-bit base, its towers are small: remove the section"
    if keys == ("contrastive",):
        return "it belongs to recipes of siglip_lora.py: remove the section"
    if key in FOREIGN_KEYS:
        return f"here it is {FOREIGN_KEYS[key]}"
    for kind, names in of_others.items():
        if keys in names:
            return f"it belongs to {kind} recipes: remove it"
    elsewhere = [name for name in known if name[-1] == key]
    if elsewhere:
        return f"here it is {'.'.join(elsewhere[0])}"
    near = [name for name in known if name[:-1] == keys[:-1]] or known
    close = difflib.get_close_matches(key, [name[-1] for name in near], n=1, cutoff=0.6)
    if close:
        return f"did you mean {'.'.join((*keys[:-1], close[0]))}?"
    if keys[:-1] == ("train",):
        return "no field of the library's training arguments has this name: remove it"
    return f"known here are {', '.join(sorted(name[-1] for name in near))}"
