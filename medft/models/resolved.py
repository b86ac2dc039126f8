"""What a run resolved to: the libraries' configurations in full, recorded and applied again.

A recipe leaves most fields to the libraries, whose defaults change. A run that is repeated takes
every field from its record, and what the libraries made of them is compared with the record.
"""

import dataclasses
import inspect
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from medft.compat import attention_implementation
from medft.errors import RunError
from medft.foreign import read_json
from medft.masking import MASK
from medft.models.run_record import Determinism, Resolved, RunRecord, reason_of
from medft.provenance import masked

OPTION = "--as-recorded"
"""Option of a recipe script, with the run.json whose resolved values are applied."""

_FREE_ARGUMENTS = re.compile(
    r"output_dir|logging_dir|resume_from_checkpoint|log_level\w*|disable_tqdm"
    r"|report_to|run_name|project|trackio_\w+|push_to_hub\w*|hub_\w+"
    r"|use_cpu|local_rank|deepspeed|dataloader_pin_memory|include_num_input_tokens_seen"
)
"""Training arguments that say where a run writes and runs, not what it trains."""

_FREE = {
    "arguments": _FREE_ARGUMENTS,
    "lora": re.compile("base_model_name_or_path|revision|peft_version|auto_mapping"),
}
"""Fields that are not taken from a record, by part; PEFT fills in those of LoraConfig."""

_NEVER_SET = re.compile(
    r"trust_remote_code|fsdp|chat_template_path|(model_init|dataset)_kwargs|(?!accelerator_)\w+_config"
)
"""Fields that could run code or read files that a record names; no run of medft sets them."""

Part = Literal["arguments", "lora", "quantization"]
"""Parts of a record that constructors of the libraries take."""

INSTALL = "install the versions that stand under packages in its run.json"

_ENVIRONMENT = (
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "MKL_CBWR",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
)
"""Variables that choose how libraries add and multiply."""

_PRODUCTS = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul")
"""Parts of torch.backends that may compute float32 products with fewer bits, as in TF32."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A record that a run repeats."""

    path: Path
    """run.json."""

    recipe: dict[str, Any]
    """The resolved recipe."""

    resolved: Resolved


def read_recorded(path: Path) -> Recorded:
    """The part of run.json that a run repeats.

    Raises:
        RunError: it cannot be read, or does not say what the run resolved to.
    """
    try:
        record = RunRecord.model_validate(read_json(path))
    except (OSError, ValueError) as error:
        raise RunError(
            f"expected the record of a run at {path}, could not read it ({reason_of(error)}): give "
            f"the run.json of a run of medft"
        ) from error
    if record.resolved is None:
        raise RunError(
            f"expected {path} to hold what the run resolved to (resolved), it does not, since an "
            f"older medft wrote it: train the run again to be able to reproduce it"
        )
    return Recorded(path, record.recipe, record.resolved)


def take_recorded(argv: list[str]) -> tuple[list[str], Recorded | None]:
    """The words of a script's command line without the record to repeat, and that record.

    Raises:
        RunError: as from `read_recorded`.
    """
    if OPTION not in argv:
        return argv, None
    at = argv.index(OPTION)
    if at + 1 == len(argv):
        raise RunError(f"expected {OPTION} RUN/run.json, got no file: name it")
    return argv[:at] + argv[at + 2 :], read_recorded(Path(argv[at + 1]))


def plain(value: Any) -> Any:
    """A value of a library's configuration as JSON has it; sets are sorted."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(plain, value))
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value).removeprefix("torch.")


def resolved_arguments(arguments: TrainingArguments) -> dict[str, Any]:
    """Every field of the training arguments; `to_dict` of the library hides some."""
    fields = (field.name for field in dataclasses.fields(arguments) if field.init)
    return {name: plain(getattr(arguments, name)) for name in fields}


def resolved_deepspeed(arguments: TrainingArguments) -> dict[str, Any] | None:
    """The file of DeepSpeed's configuration, `auto` where the run's own values go.

    Returns:
        None without DeepSpeed.
    """
    if arguments.deepspeed_plugin is None:
        return None
    return read_json(Path(os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"]))


def resolved_model(model: nn.Module) -> dict[str, Any]:
    """LoraConfig, BitsAndBytesConfig and the attention by part of the configuration.

    Args:
        model: as it is trained; None stands for no adapter or no quantization.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config: Any = base.config
    packed = getattr(config, "quantization_config", None)
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    configs = {"": config, **{name: part for name, part in parts.items() if part is not None}}
    return {
        "lora": plain(model.peft_config["default"]) if isinstance(model, PeftModel) else None,
        "quantization": None if packed is None else public_fields(plain(packed)),
        "attention": {name: attention_implementation(part) for name, part in configs.items()},
    }


def public_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of BitsAndBytesConfig that its constructor takes."""
    return {k: v for k, v in fields.items() if not k.startswith("_") and k != "quant_method"}


def determinism() -> Determinism:
    """The settings of this process."""
    return Determinism(
        deterministic_algorithms=torch.are_deterministic_algorithms_enabled(),
        cudnn_deterministic=torch.backends.cudnn.deterministic,
        cudnn_benchmark=torch.backends.cudnn.benchmark,
        float32_precision={name: _products(name).fp32_precision for name in _PRODUCTS},
        environment={name: os.environ.get(name) for name in _ENVIRONMENT},
    )


def apply_determinism(recorded: Determinism) -> None:
    """Set torch as recorded; the environment is set by who starts the process."""
    torch.use_deterministic_algorithms(recorded.deterministic_algorithms)
    torch.backends.cudnn.deterministic = recorded.cudnn_deterministic
    torch.backends.cudnn.benchmark = recorded.cudnn_benchmark
    for name in _PRODUCTS:
        value = recorded.float32_precision.get(name)
        if value not in (None, _products(name).fp32_precision):
            _products(name).fp32_precision = value


def environment_of(recorded: Determinism) -> dict[str, str]:
    """The environment for a process that repeats a run: this one's, but for what was recorded."""
    chosen = {name: recorded.environment.get(name) for name in _ENVIRONMENT}
    kept = {name: value for name, value in os.environ.items() if name not in chosen}
    set_then = {name: value for name, value in chosen.items() if value is not None}
    return {**kept, **set_then}


def _products(name: str) -> Any:
    return attrgetter(name)(torch.backends)


def recorded_fields(config_class: type, recorded: Recorded | None, part: Part) -> dict[str, Any]:
    """The recorded fields for the constructor of a library's configuration; {} without a record.

    Args:
        config_class: of the installed library.
        recorded: the record that the run repeats.
        part: of the record.

    Raises:
        RunError: the installed library lacks a recorded field, its value was masked, or medft
            never sets it.
    """
    found = (getattr(recorded.resolved, part) if recorded else None) or {}
    taken = {name: value for name, value in found.items() if not is_free(part, name)}
    if foreign := sorted(name for name in taken if _NEVER_SET.fullmatch(name) and taken[name]):
        raise RunError(
            f"expected {foreign[0]} of {config_class.__name__} to be unset in a record, as medft "
            f"leaves it, got {taken[foreign[0]]!r}: take the run.json that medft wrote"
        )
    lacking = sorted(taken.keys() - inspect.signature(config_class).parameters.keys())
    hidden = sorted(name for name, value in taken.items() if value == MASK)
    if lacking or hidden:
        package = config_class.__module__.partition(".")[0]
        reason = f"the installed {package} lacks them" if lacking else "they are masked as secrets"
        raise RunError(
            f"expected to apply every recorded field of {config_class.__name__}, {reason}: "
            f"{', '.join(lacking or hidden)}: not comparable, {INSTALL}"
        )
    return taken


def is_free(part: str, name: str) -> bool:
    """Whether a recorded field is not applied again."""
    return part in _FREE and _FREE[part].fullmatch(name) is not None


def changed_fields(
    part: str, then: Mapping[str, Any] | None, now: Mapping[str, Any] | None
) -> list[tuple[str, Any, Any]]:
    """Name, recorded and present value of each field of a part that differs now."""
    found, present = then or {}, masked(dict(now or {}))
    return [
        (name, found.get(name), present.get(name))
        for name in sorted(found.keys() | present.keys())
        if not is_free(part, name) and found.get(name) != present.get(name)
    ]


def check_applied(now: Mapping[str, Any], recorded: Recorded) -> None:
    """Refuse, before the first step, a run that is not what the record says.

    Fields that only the installed libraries have are left to them.

    Args:
        now: what this run resolved to.
        recorded: the record that it repeats.

    Raises:
        RunError: a value that the libraries made differs from the record.
    """
    then = recorded.resolved.model_dump()
    for part, fields in now.items():
        known = then[part] or {}
        for name, was, is_now in changed_fields(part, known, fields):
            if name in known or not known:
                raise RunError(
                    f"expected {part}.{name} {was!r} as recorded in {recorded.path}, the installed "
                    f"libraries make it {is_now!r}: not comparable, {INSTALL}"
                )


def use_recorded_attention(model: PreTrainedModel, recorded: Recorded | None) -> None:
    """Give a base the attention of a record, if there is one."""
    if recorded is not None:
        known = {name: kind for name, kind in recorded.resolved.attention.items() if kind}
        model.set_attn_implementation(known)
