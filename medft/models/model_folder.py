"""Files of a base or an adapter, looked at before a library reads them."""

import json
import os
from pathlib import Path
from typing import Any

from medft.config.strict_yaml import shortened
from medft.errors import BaseModelError
from medft.foreign import open_regular, read_json

_CODE_KEYS = ("auto_map", "auto_mapping", "custom_generate", "megatron_config")
"""Keys by which a configuration names code that transformers or PEFT would import."""


_BOUNDS = {
    "num_hidden_layers": 512,
    "num_global_layers": 512,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**14,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "projection_dim": 2**17,
    "projection_size": 2**17,
    "vision_output_dim": 2**20,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**24,
    "num_labels": 2**16,
    "image_size": 2**13,
    "patch_size": 2**13,
    "num_channels": 2**10,
    "max_num_tiles": 64,
    "max_image_tiles": 64,
    "mm_tokens_per_image": 2**16,
    "image_seq_length": 2**16,
}
"""Sizes that libraries build from, and what they are at most; the least is 1."""

_MAX_HEADER_BYTES = 10**8
"""Bytes of a safetensors header at most, as in its library."""

_MAX_WEIGHTS_BYTES = 2**37
"""Bytes of a safetensors file at most; transformers writes 50 GB at most."""


def check_model_folder(folder: Path) -> None:
    """Refuse a folder whose files name code of their own, lack bounds, or cannot be read.

    Configurations are the files that transformers and PEFT may read as such: config.json and the
    versions of it that it can name, those of processor, tokenizer, generation and adapter.

    Args:
        folder: of a base or an adapter.

    Raises:
        BaseModelError: a configuration names code, is not JSON or has a size out of bounds; there
            is code for generation; or a file is a pipe, a device or a link to nothing.
    """
    for path in sorted(folder.iterdir()):
        if not (path.is_file() or path.is_dir()):
            raise BaseModelError(
                f"expected regular files in {folder}, {path.name} is a pipe, a device or a link to "
                f"nothing: remove it, or restore the file"
            )
    if (folder / "custom_generate").exists():
        raise _own_code(folder, "custom_generate/")
    for path in sorted(folder.glob("*config*.json")):
        try:
            content = read_json(path, strict=False)
        except (OSError, ValueError) as error:
            raise BaseModelError(
                f"expected JSON in {path}, could not read it ({error}): restore the file"
            ) from error
        if not isinstance(content, dict):
            raise BaseModelError(
                f"expected an object in {path}, got a {type(content).__name__}: restore the file"
            )
        if key := _key_of_code(content):
            raise _own_code(folder, f"{key} in {path.name}")
        if size := _size_without_bound(content):
            raise BaseModelError(
                f"expected sizes of a model in {path}, got {size}: restore the file"
            )


def check_lengths(folder: Path) -> list[Path]:
    """The safetensors files of a folder, each as long as its header says, before one is read whole.

    Raises:
        BaseModelError: one is not.
    """
    paths = sorted(folder.glob("*.safetensors"))
    for path in paths:
        _check_length(path)
    return paths


def _check_length(path: Path) -> None:
    try:
        with open_regular(path, max_bytes=_MAX_WEIGHTS_BYTES) as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"its header has {length} bytes")
            header = json.loads(file.read(length))
            tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
            end = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors), default=0)
            if (size := file.seek(0, os.SEEK_END)) != end:
                raise ValueError(f"it has {size} bytes, its header says {end}")
    except Exception as error:  # any, from a header of any form
        raise BaseModelError(
            f"expected complete safetensors in {path}, could not read it "
            f"({str(error) or type(error).__name__}): restore the file"
        ) from error


def _own_code(folder: Path, where: str) -> BaseModelError:
    return BaseModelError(
        f"expected a model without code of its own, {folder} names some by {where}: medft runs "
        f"none, take a base that transformers knows, or remove what names it"
    )


def _key_of_code(content: Any) -> str | None:
    """The first key at any depth that names code, and is not empty."""
    if isinstance(content, dict):
        named = (key for key in _CODE_KEYS if content.get(key) and not _is_pefts(key, content[key]))
        return next(named, None) or _key_of_code(list(content.values()))
    if isinstance(content, list):
        return next(filter(None, map(_key_of_code, content)), None)
    return None


def _size_without_bound(content: Any) -> str | None:
    """The first size at any depth that is out of bounds, and its bounds."""
    if isinstance(content, list):
        return next(filter(None, map(_size_without_bound, content)), None)
    if not isinstance(content, dict):
        return None
    for key in (key for key in _BOUNDS if key in content):
        value = content[key]
        for size in value if isinstance(value, list) else [value]:
            if isinstance(size, int | float) and not 1 <= size <= _BOUNDS[key]:
                return f"{key} {shortened(size)}, which is not in 1 to {_BOUNDS[key]}"
    return _size_without_bound(list(content.values()))


def _is_pefts(key: str, value: Any) -> bool:
    """Whether it is what PEFT writes of a base's class in transformers."""
    library = value.get("parent_library") if isinstance(value, dict) else None
    in_transformers = isinstance(library, str) and library.startswith("transformers.models.")
    return key == "auto_mapping" and in_transformers
