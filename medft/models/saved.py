"""What a path to a trained model means: the layout of a run directory, and the record medft.json.

A path is resolved once per command, by `find_saved_model`, and handed down as a SavedModel.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

import medft
from medft.config.recipe import ModelSection, QuantizationSection
from medft.config.strict_yaml import PathText, Section, shortened
from medft.errors import BaseModelError, RunError
from medft.files import write_json
from medft.foreign import at_home, path_problem, read_json
from medft.models.base import base_sha256, load_config
from medft.models.model_folder import check_lengths, check_model_folder
from medft.models.run_record import RunRecord, reason_of
from medft.provenance import masked, remembered_sha256

RECORD_FILE = "medft.json"
WEIGHTS_FILE = "adapter_model.safetensors"

FORMAT: Literal[1] = 1
"""Version of the record; a newer one is refused. Records without a version are older ones."""


@dataclass(frozen=True, slots=True)
class RunLayout:
    """Names in a run directory."""

    directory: Path

    @property
    def record(self) -> Path:
        """run.json: what was run, on what, and how it ended."""
        return self.directory / "run.json"

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.directory / "recipe.yaml"

    @property
    def history(self) -> Path:
        """Trainer's log history."""
        return self.directory / "log_history.json"

    @property
    def curves(self) -> Path:
        """The plot of the log history."""
        return self.directory / "curves.png"

    @property
    def adapter(self) -> Path:
        """The final adapter."""
        return self.directory / "adapter"

    @property
    def model(self) -> Path:
        """The final model of full fine-tuning."""
        return self.directory / "model"

    @property
    def best_model(self) -> Path:
        """The adapter or model of the best evaluation."""
        return self.directory / "best_model"

    @property
    def index(self) -> Path:
        """Embeddings of the training images of a SigLIP run, once they were asked for."""
        return self.directory / "index.npz"

    @property
    def results(self) -> list[Path]:
        """The final adapter or model, if it was written."""
        return [path for path in (self.adapter, self.model) if path.is_dir()]

    def read_record(self) -> dict[str, Any]:
        """The content of run.json.

        Raises:
            RunError: it is missing or cannot be read.
        """
        try:
            content = read_json(self.record)
            RunRecord.model_validate(content)
        except (OSError, ValueError) as error:
            raise RunError(
                f"expected the record of a run at {self.record}, could not read it "
                f"({reason_of(error)}): give the output_dir of a run of medft"
            ) from error
        return {"trainable_parameters": 0, "total_parameters": 0} | content


class SavedRecord(Section):
    """medft.json: what inference must know beyond plain PEFT and transformers files."""

    format: Literal[1] = FORMAT
    """Version of the record."""

    medft: str | None = None
    """Version of medft that wrote it."""

    family: str
    """model_type of the base."""

    base: PathText
    """Hub id or folder of the base."""

    revision: str | None
    """Commit of the base on the hub."""

    sha256: str | None = None
    """Content hash of a base in a local folder."""

    dtype: Literal["bfloat16", "float16", "float32"] = "float32"
    """Precision that the base was trained in."""

    quantization: QuantizationSection | None = None
    """How the base was quantized."""

    cross_attention_fix: bool = False
    """Mllama: whether rows are independent of each other."""

    max_image_tiles: int | None = Field(None, ge=1, le=64)
    """Mllama: tiles of an image at most."""

    image_size: int | None = Field(None, ge=1, le=2**13)
    """SigLIP: side of the square input in pixels."""

    max_length: int | None = Field(None, ge=1, le=2**20)
    """Tokens of a row, or of a SigLIP text, at most."""

    caption: str | None = None
    """SigLIP: template of captions."""

    splits_head: bool = False
    """SigLIP: whether the pooling head is split into layers, which carry adapters."""

    logit_scale: float | None = None
    """SigLIP: learned log scale of the logits."""

    logit_bias: float | None = None
    """SigLIP: learned bias of the logits."""

    prompts: list[str] | None = None
    """Declared prompts of the training rows, as templates; null if rows had their own questions."""

    system: str | None = None
    """The system turn that every training row had."""

    longest_answer: int | None = Field(None, ge=0, le=2**20)
    """Tokens of the longest trained answer, its end included."""

    merged_onto: Literal["original"] | None = None
    """The weights that an adapter was merged into."""

    weights: str | None = None
    """SHA-256 of the safetensors files beside it."""

    @classmethod
    def read(cls, folder: Path) -> "SavedRecord":
        """The record of a folder that medft wrote.

        Raises:
            BaseModelError: it is missing, unreadable, of a newer format, or has other keys.
        """
        path = folder / RECORD_FILE
        try:
            content = read_json(path)
            version = content.get("format", FORMAT)
        except (OSError, ValueError, AttributeError) as error:
            raise BaseModelError(
                f"expected {RECORD_FILE} in {folder}, could not read it ({error}): give a folder "
                f"that medft wrote"
            ) from error
        if isinstance(version, int) and version > FORMAT:
            raise BaseModelError(
                f"expected {path} of format {FORMAT} or older, it has {shortened(version)}: "
                f"upgrade medft"
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise BaseModelError(
                f"expected the keys that medft writes in {path}, {reason_of(error)}: restore the "
                f"file"
            ) from error

    def write(self, folder: Path) -> None:
        """Write the record beside the weights in a folder, their hash with it."""
        own = {"medft": medft.__version__, "weights": weights_sha256(folder)}
        content = self.model_copy(update=own).model_dump(mode="json", exclude_none=True)
        write_json(folder / RECORD_FILE, masked({**content, "revision": self.revision}))


def weights_sha256(folder: Path) -> str | None:
    """One hash of the safetensors files of a folder; None if there are none.

    Raises:
        BaseModelError: one is not complete.
    """
    digests = [remembered_sha256(path) for path in check_lengths(folder)]
    return hashlib.sha256("".join(digests).encode()).hexdigest() if digests else None


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedModel:
    """A trained model on disk and its record."""

    folder: Path
    """Of the adapter, or of the complete model."""

    record: SavedRecord
    """Of a model that medft did not write: its family, and defaults."""

    is_adapter: bool
    run: RunLayout | None
    """The run that it is the result of, if the path named one."""

    @property
    def base(self) -> ModelSection:
        """The model to load: an adapter's base, or the folder itself."""
        if not self.is_adapter:
            return ModelSection(base=str(self.folder))
        base = str(at_home(self.record.base))
        return ModelSection(base=base, revision=self.record.revision, dtype=self.record.dtype)

    @property
    def weights(self) -> str:
        """What identifies its weights: a hash of the adapter or model files."""
        return (weights_sha256(self.folder) or "")[:16]

    @property
    def is_encoder(self) -> bool:
        """Whether it is a SigLIP."""
        return self.record.family in ("siglip", "siglip2")

    def check(self) -> None:
        """Refuse weights that are not those the record was written beside, or another base.

        Raises:
            BaseModelError: a hash differs.
        """
        check_weights(self.folder, self.record)
        expected = self.record.sha256 if self.is_adapter else None
        if expected and base_sha256(Path(self.base.base)) != expected:
            raise BaseModelError(
                f"expected the base that the adapter was trained on in {self.base.base}, its files "
                f"have changed: restore them"
            )


def check_weights(folder: Path, record: SavedRecord) -> None:
    """Refuse weights that are not those a record was written beside.

    Raises:
        BaseModelError: they differ.
    """
    if record.weights and weights_sha256(folder) != record.weights:
        raise BaseModelError(
            f"expected the weights in {folder} that its {RECORD_FILE} was written beside, they "
            f"have changed: restore them"
        )


def _adapter_folder(source: Path) -> Path:
    """The adapter folder that a path means; raises RunError as `find_saved_adapter`."""
    if not source.exists():
        raise RunError(
            f"expected a run or a folder of a model, there is no {source}: check the path"
        )
    run = RunLayout(source)
    if run.record.is_file():
        _check_completed(run)
        source = run.adapter
    if not (source / "adapter_config.json").is_file():
        raise RunError(
            f"expected a run or an adapter folder, {source} holds no adapter_config.json: "
            f"give the output_dir of a run with lora"
        )
    return source


def _check_completed(run: RunLayout) -> None:
    """Refuse the result of a run that has not ended, or has gone on since it was written."""
    status = run.read_record()["status"]
    if status != "completed":
        raise RunError(
            f"expected a completed run in {run.directory}, its status is {status}: resume it, or "
            f"give its best_model/ or a checkpoint"
        )


def _check_path(source: Path) -> None:
    problem = path_problem(str(source))
    if problem:
        raise RunError(f"expected {problem}, got {source}: rename the folder")


def find_saved_adapter(source: Path) -> SavedModel:
    """The adapter of a run or an adapter folder.

    Raises:
        RunError: the path does not exist, or is neither a finished run nor an adapter.
        BaseModelError: its record cannot be read.
    """
    _check_path(source)
    folder = _adapter_folder(source)
    check_model_folder(folder)
    return _saved(source, folder, SavedRecord.read(folder), is_adapter=True)


def find_saved_model(source: Path) -> SavedModel:
    """The model that a run, an adapter folder or a model folder holds.

    Raises:
        RunError: the run is not completed, or the path is none of the three.
        BaseModelError: the record or the configuration cannot be read.
    """
    _check_path(source)
    run = RunLayout(source)
    if (source / "config.json").is_file():
        folder = source
    elif run.record.is_file() and run.model.is_dir():
        _check_completed(run)
        folder = run.model
    else:
        return find_saved_adapter(source)
    check_model_folder(folder)
    if (folder / RECORD_FILE).exists():
        record = SavedRecord.read(folder)
    else:
        family = load_config(ModelSection(base=str(folder))).model_type
        record = SavedRecord(family=family, base=str(folder), revision=None)
    return _saved(source, folder, record, is_adapter=False)


def _saved(source: Path, folder: Path, record: SavedRecord, *, is_adapter: bool) -> SavedModel:
    run = RunLayout(source)
    return SavedModel(
        folder=folder,
        record=record,
        is_adapter=is_adapter,
        run=run if run.record.is_file() else None,
    )
