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
    resumed: list[str] = []
    trainable_parameters: int = 0
    total_parameters: int = 0
    metrics: dict[str, _Number] = {}
    launch: RecordedLaunch | None = None
    resolved: Resolved | None = None
    resumed_from_steps: list[int] = []


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
