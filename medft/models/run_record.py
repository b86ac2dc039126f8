"""run.json as medft reads it: the parts that it uses have their types, whoever wrote the file."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from medft.config.strict_yaml import PathText


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


class _RecordedRows(_Recorded):
    path: PathText
    sha256: str


class _RecordedData(_Recorded):
    train: _RecordedRows
    validation: _RecordedRows | None = None


class _RecordedBase(_Recorded):
    base: PathText


class _RecordedBatch(_Recorded):
    steps: int
    effective: int


class RunRecord(_Recorded):
    """What medft reads of run.json."""

    status: Literal["running", "completed", "interrupted", "failed"]
    recipe: dict[str, Any]
    base: _RecordedBase
    data: _RecordedData
    batch: _RecordedBatch
    started: str
    steps_done: int | None = None
    trainable_parameters: int = 0
    total_parameters: int = 0
    metrics: dict[str, int | float] = {}
