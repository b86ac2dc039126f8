"""Resolves a path to a trained model (run, adapter folder or full model) and its record."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import medft
from medft.config.recipe import ModelSection
from medft.errors import BaseModelError, RunError
from medft.files import file_sha256, write_json
from medft.models.base import load_config
from medft.provenance import folder_sha256, masked

RECORD_FILE = "medft.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def find_adapter(source: Path) -> Path:
    """The adapter folder of a run, or the path itself.

    Raises:
        RunError: the path is neither a completed run nor an adapter.
    """
    if (source / "run.json").is_file():
        status = read_run_record(source).get("status")
        if status != "completed":
            raise RunError(
                f"expected a completed run in {source}, its status is {status}: resume it, or "
                f"give its best_model/ or a checkpoint"
            )
        source = source / "adapter"
    if not (source / "adapter_config.json").is_file():
        raise RunError(
            f"expected a run or an adapter folder, {source} holds no adapter_config.json: "
            f"give the output_dir of a run with lora"
        )
    return source


def check_same_base(base: ModelSection, record: dict[str, Any]) -> None:
    """Raise if the files of a base folder are not those that the adapter was trained on.

    Raises:
        BaseModelError: the content hash differs.
    """
    if "sha256" in record and folder_sha256(Path(base.base)) != record["sha256"]:
        raise BaseModelError(
            f"expected the base that the adapter was trained on in {base.base}, its files "
            f"have changed: restore them"
        )


def write_saved_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write medft.json: what plain PEFT files cannot hold of a trained model."""
    write_json(folder / RECORD_FILE, masked({"medft": medft.__version__, **record}))


def read_saved_record(folder: Path) -> dict[str, Any]:
    """The content of medft.json in the folder of a trained model.

    Raises:
        BaseModelError: it cannot be read, or lacks family, base or revision.
    """
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        if {"family", "base", "revision"} <= record.keys():
            return record
    except (OSError, ValueError, AttributeError) as error:
        raise BaseModelError(
            f"expected {RECORD_FILE} in {folder}, could not read it: give a folder that medft wrote"
        ) from error
    raise BaseModelError(
        f"expected family, base and revision in {folder / RECORD_FILE}, it lacks some: "
        f"give a folder that medft wrote"
    )


def read_run_record(run: Path) -> dict[str, Any]:
    """The content of a run's run.json.

    Raises:
        RunError: it cannot be read.
    """
    try:
        return json.loads((run / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"expected the record of a run at {run / 'run.json'}, could not read it: "
            f"give the output_dir of a run of medft"
        ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedModel:
    """Folder and record of a trained model."""

    folder: Path
    """Folder of the adapter, or of the full model."""

    record: dict[str, Any]
    """Content of medft.json; empty for a model that medft did not write."""

    is_adapter: bool

    @property
    def base(self) -> ModelSection:
        """The model to load: an adapter's base, or the folder itself."""
        if not self.is_adapter:
            return ModelSection(base=str(self.folder))
        base = str(Path(self.record["base"]).expanduser())
        dtype = self.record.get("dtype", "float32")
        return ModelSection(base=base, revision=self.record["revision"], dtype=dtype)

    @property
    def weights(self) -> str:
        """Identifier of the weights: 16 hexadecimal digits of a hash.

        It covers the content of an adapter; of a full model, which is large, the names, sizes and
        modification times of its weight files.
        """
        digest = hashlib.sha256()
        for path in sorted(self.folder.glob("*.safetensors")):
            state = path.stat()
            known = f"{path.name} {state.st_size} {state.st_mtime_ns}"
            digest.update((file_sha256(path) if self.is_adapter else known).encode())
        return digest.hexdigest()[:16]

    @property
    def is_encoder(self) -> bool:
        """Whether the model is SigLIP or SigLIP 2."""
        family = self.record.get("family") or load_config(self.base).model_type
        return family in ("siglip", "siglip2")


def find_saved_model(source: Path) -> SavedModel:
    """The model that a run, an adapter folder or a model folder holds.

    Raises:
        RunError: the run of an adapter is not completed, or the path is none of the three.
    """
    if (source / "config.json").is_file():
        folder, is_adapter = source, False
    elif (source / "run.json").is_file() and (source / "model").is_dir():
        folder, is_adapter = source / "model", False
    else:
        folder, is_adapter = find_adapter(source), True
    has_record = is_adapter or (folder / RECORD_FILE).is_file()
    record = read_saved_record(folder) if has_record else {}
    return SavedModel(folder=folder, record=record, is_adapter=is_adapter)
