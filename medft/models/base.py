"""Loads the config, processor and weights of a base model from the hub or a folder.

A base that cannot be loaded is an error of one sentence.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import DeepSpeedPlugin, PartialState, init_empty_weights
from accelerate.utils import broadcast_object_list
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from PIL import Image
from transformers import (
    AutoConfig,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from medft.compat import resizes_by_pillow, unsharded
from medft.config.recipe import ModelSection
from medft.config.strict_yaml import shortened
from medft.errors import BaseModelError
from medft.models.model_folder import check_lengths, check_model_folder
from medft.provenance import folder_sha256, remembered_sha256

_MAX_SIDE = 2**13
"""Pixels of an input's side at most, as of data.image_size."""


@contextmanager
def readable_base(model: ModelSection) -> Iterator[None]:
    """Convert an exception of `from_pretrained` inside the block to an error of one sentence.

    Raises:
        BaseModelError: the base is missing, not accessible, or not readable.
    """
    try:
        yield
    except BaseModelError:
        raise
    except Exception as error:  # foreign files make the library raise any exception
        raise BaseModelError(_explain(model, error)) from error


def _explain(model: ModelSection, error: Exception) -> str:
    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    if any(isinstance(cause, GatedRepoError) for cause in chain) or "gated repo" in str(error):
        return (
            f"expected access to model.base {model.base}, it is gated: accept its license on the "
            f"hub's page and set HF_TOKEN, or give a local folder"
        )
    if any(isinstance(cause, RepositoryNotFoundError) for cause in chain):
        return (
            f"expected model.base to be a model on the hub or a local folder, {model.base!r} is "
            f"neither: check the name, or set HF_TOKEN if it is private"
        )
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if any(isinstance(cause, LocalEntryNotFoundError) for cause in chain) or (
        offline and not Path(model.base).exists()
    ):
        where = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        return (
            f"expected model.base {model.base} on this machine, it is not there and {where}: "
            f"download it first or give a local folder"
        )
    if not Path(model.base).exists() and "/" not in model.base.strip("/"):
        return f"expected model.base to be a hub id or a local folder, {model.base!r} is neither"
    return (
        f"expected a readable model at model.base {model.base}, it cannot be loaded: "
        f"{(str(error).strip() or type(error).__name__).splitlines()[0]}"
    )


def check_local_base(model: ModelSection) -> None:
    """Raise, before the hub is queried, if a base looks like a folder and is not a model folder.

    Raises:
        BaseModelError: the path does not exist, holds no config.json, or what `check_model_folder`
            refuses.
    """
    base = Path(model.base)
    looks_local = model.base.startswith((".", "/", "~")) or model.base.count("/") != 1
    if base.is_dir():
        if not (base / "config.json").is_file():
            raise BaseModelError(
                f"expected config.json in model.base {model.base}, there is none: "
                f"give the folder of a complete model"
            )
        check_model_folder(base)
    elif looks_local:
        raise BaseModelError(
            f"expected model.base to be a hub id or a local folder, {model.base!r} is neither: "
            f"check the path"
        )


def load_config(model: ModelSection) -> PreTrainedConfig:
    """The base's configuration.

    Raises:
        BaseModelError: it cannot be read.
    """
    check_local_base(model)
    with readable_base(model):
        config = AutoConfig.from_pretrained(
            model.base, revision=model.revision, trust_remote_code=False
        )
    check_model_folder(_folder_of(model))
    return config


def commit_of(model: ModelSection) -> str | None:
    """The commit on the hub of a base whose configuration was loaded; None for a local folder.

    The rest of the base is loaded from this commit, even if its branch has moved since.
    """
    return None if Path(model.base).is_dir() else _folder_of(model).name


def _folder_of(model: ModelSection) -> Path:
    """The folder of a base: as given, or its commit in the hub's cache."""
    if Path(model.base).is_dir():
        return Path(model.base)
    file = try_to_load_from_cache(model.base, "config.json", revision=model.revision)
    if not isinstance(file, str):
        raise BaseModelError(
            f"expected {model.base} in the hub's cache after its configuration was loaded, it is "
            f"not there: download it to a folder and give that as model.base"
        )
    return Path(file).parent


def load_processor(model: ModelSection) -> ProcessorMixin:
    """The base's processor, with images resized by Pillow on every machine.

    transformers uses torchvision where it is installed, and the two resize differently.

    Raises:
        BaseModelError: it cannot be read, makes images without bound, or transformers chose another
            backend.
    """
    check_model_folder(_folder_of(model))
    with readable_base(model):
        processor = AutoProcessor.from_pretrained(
            model.base, revision=commit_of(model), backend="pil", trust_remote_code=False
        )
        if not resizes_by_pillow(processor):
            raise BaseModelError(
                f"expected a Pillow image processor for model.base {model.base}, transformers "
                f"gives {type(processor.image_processor).__name__}: upgrade transformers"
            )
        _try_images(processor.image_processor, model.base)
    return processor


def _try_images(images: Any, base: str) -> None:
    """Refuse an image processor that makes images without bound, or none of a small one."""
    sides = [side for side in dict(images.size).values() if side is not None]
    pixels = [*sides, getattr(images, "max_image_tiles", None) or 1]
    if (
        any(not isinstance(side, int) or not 1 <= side <= _MAX_SIDE for side in sides)
        or math.prod(pixels) > _MAX_SIDE**2
    ):
        raise BaseModelError(
            f"expected images of 1 to {_MAX_SIDE} pixels a side in the processor of {base}, "
            f"got {shortened(sides)}: restore its preprocessor_config.json"
        )
    gradient = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    if not images([gradient], return_tensors="pt")["pixel_values"].isfinite().all():
        raise BaseModelError(
            f"expected finite values from the image processor of {base}, got others: restore its "
            f"preprocessor_config.json"
        )


def empty_model(
    auto_class: type[Any],
    config: PreTrainedConfig,
    *,
    deepspeed_plugin: DeepSpeedPlugin | None = None,
) -> PreTrainedModel:
    """The model without weights: modules and shapes on the meta device.

    Args:
        auto_class: AutoModel or a similar auto class.
        config: of the base.
        deepspeed_plugin: of the training arguments; ZeRO-3 would shard weights that do not exist.
    """
    with unsharded(deepspeed_plugin):
        with init_empty_weights():
            model = auto_class.from_config(config, trust_remote_code=False)
        model.tie_weights()  # the meta device undid the tying
        return model


def load_weights(auto_class: type[Any], model: ModelSection, **options: Any) -> PreTrainedModel:
    """The base with its weights; every tensor of the model must be in its files.

    transformers initializes a missing tensor at random and only lists it in a table.

    Args:
        auto_class: AutoModel or a similar auto class.
        model: the recipe's section.
        **options: arguments of from_pretrained: dtype, quantization_config.

    Raises:
        BaseModelError: it cannot be loaded, or a tensor is missing or of another shape.
    """
    check_model_folder(_folder_of(model))
    with readable_base(model):
        loaded, report = auto_class.from_pretrained(
            model.base,
            revision=commit_of(model),
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
            **options,
        )
    wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if wrong:
        raise BaseModelError(
            f"expected every tensor of the model in {model.base}, {len(wrong)} are missing or of "
            f"another shape, first {wrong[0]}: download it again"
        )
    return loaded


def identify_base(model: ModelSection) -> dict[str, Any]:
    """Identity of the base for run.json: its commit on the hub, or the hash of its folder."""
    record: dict[str, Any] = {"base": model.base, "revision": commit_of(model)}
    if Path(model.base).is_dir():
        hashes = [base_sha256(Path(model.base)) if PartialState().is_main_process else None]
        record["sha256"] = broadcast_object_list(hashes)[0]
    return record


def base_sha256(folder: Path) -> str:
    """Content hash of a base in a local folder; unchanged files are hashed once.

    Raises:
        BaseModelError: its weights are not complete.
    """
    check_lengths(folder)
    return folder_sha256(folder, hash_of=remembered_sha256)


def default_device() -> torch.device:
    """The device for a trained model: CUDA if available, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
