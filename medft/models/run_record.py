"""run.json and log_history.json: what medft reads of them has its types, whoever wrote them."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from medft.config.strict_yaml import PathText
from medft.errors import RunError
from medft.foreign import read_json

_Number = Annotated[int, Field(gt=-(2**63), lt=2**63)] | float
"""An integer that a float can hold, or a float."""


def reason_of(error: Exception) -> str:
    """What is wrong with a record that was read: of pydantic's errors, the first."""
    if not isinstance(error, ValidationError):
        return str(error)
    found = error.errors()[0]
    key = ".".join(map(str, found["loc"])) or "its content"
    return f"{key}: {found['msg']}"


class _Recorded(BaseModel):
    """A part of run.json: what stands here has this type, and there is more."""

    model_config = ConfigDict(strict=True, extra="allow")


class _RecordedFiles(_Recorded):
    path: PathText
    sha256: str


class _RecordedData(_Recorded):
    train: _RecordedFiles
    validation: _RecordedFiles | None = None
    test: _RecordedFiles | None = None


class _RecordedBase(_Recorded):
    base: PathText


class _RecordedBatch(_Recorded):
    steps: int
    effective: int
    steps_per_epoch: int | None = None


class Determinism(_Recorded):
    """Settings of a process that decide how sums are computed, beyond its threads."""

    deterministic_algorithms: bool
    cudnn_deterministic: bool
    cudnn_benchmark: bool
    float32_precision: dict[str, str]
    """By part of torch.backends: how products of float32 are computed."""

    environment: dict[str, str | None]
    """Variables of the libraries, null where they were not set."""


class Resolved(_Recorded):
    """What a run resolved to, by the libraries' own names of fields."""

    arguments: dict[str, Any]
    """TrainingArguments, or SFTConfig."""

    deepspeed: dict[str, Any] | None
    """DeepSpeed's configuration, if it ran."""

    lora: dict[str, Any] | None
    """LoraConfig of an adapter."""

    quantization: dict[str, Any] | None
    """BitsAndBytesConfig of a quantized base."""

    attention: dict[str, Annotated[str, Field(pattern="^[a-z0-9_]+$")] | None]
    """Implementation by part of the base's configuration; empty name: the whole. One with a slash
    would be code from the hub."""

    determinism: Determinism


class RecordedLaunch(_Recorded):
    """How a run was started."""

    launcher: str
    strategy: Literal["single", "ddp", "zero2", "zero3"]
    asked_processes: int | None
    processes: Annotated[int, Field(ge=1, le=2**16)]
    threads: Annotated[int, Field(ge=1, le=2**16)]
    """Of torch, in each process."""


class RunPart(_Recorded):
    """A start of a run, and how far it came; the newest one's entries stand in run.json as well."""

    started: str
    from_step: int | None
    """0 for a start afresh; None where an older medft did not write it."""

    launch: RecordedLaunch | None = None
    changed: dict[str, Any] = {}
    """Recipe keys that differ from the part before, with both values."""


class RunRecord(_Recorded):
    """What medft reads of run.json."""

    status: Literal["running", "completed", "interrupted", "failed"]
    recipe: dict[str, Any]
    base: _RecordedBase
    data: _RecordedData
    batch: _RecordedBatch
    started: str
    init_from: _RecordedFiles | None = None
    steps_done: int = 0
    parts: list[RunPart] = []
    resumed: list[str] = []
    """Of an older medft, instead of parts: when the run went on."""

    trainable_parameters: int = 0
    total_parameters: int = 0
    metrics: dict[str, _Number] = {}
    launch: RecordedLaunch | None = None
    resolved: Resolved | None = None
    resumed_from_steps: list[int] = []
    """Of an older medft: after which steps it went on, at the last of these times."""


PART_KEYS = (
    "status",
    "medft",
    "argv",
    "started_in",
    "packages",
    "hardware",
    "launch",
    "saved_step",
    "steps_done",
    "error",
    "ended",
)
"""Entries of run.json that concern its newest part alone."""


def parts_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The starts of a run in their order, of an older medft's record as far as it knew them.

    Args:
        record: as from `RunLayout.read_record`.
    """
    if "parts" in record:
        return record["parts"]
    starts = [record["started"], *record.get("resumed", [])]
    steps = record.get("resumed_from_steps", [])
    known = [0, *[None] * (len(starts) - 1 - len(steps)), *steps]
    parts = [{"started": s, "from_step": step} for s, step in zip(starts, known, strict=False)]
    return [*parts[:-1], parts[-1] | {key: record[key] for key in PART_KEYS if key in record}]


def resumed_steps(record: dict[str, Any]) -> list[int]:
    """The steps after which a run went on from a checkpoint."""
    return [part["from_step"] for part in parts_of(record) if part["from_step"]]


def leaves(content: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """The values of nested dicts with their keys, joined by dots."""
    if not isinstance(content, dict):
        return [(prefix, content)]
    return [
        leaf
        for key, inner in content.items()
        for leaf in leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    ]


_HISTORY: TypeAdapter[list[dict[str, int | float | None]]] = TypeAdapter(
    list[dict[str, _Number | None]]
)


def read_log_history(path: Path) -> list[dict[str, int | float | None]]:
    """The content of log_history.json.

    Raises:
        RunError: it is missing or cannot be read.
    """
    try:
        return _HISTORY.validate_python(read_json(path), strict=True)
    except (OSError, ValueError) as error:
        raise RunError(
            f"expected the log of a run at {path}, could not read it ({reason_of(error)}): restore "
            f"or remove it"
        ) from error
