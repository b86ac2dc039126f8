"""Files of a base or an adapter, looked at before a library reads them."""

from pathlib import Path
from typing import Any

from medft.errors import BaseModelError
from medft.foreign import read_json

_CODE_KEYS = ("auto_map", "auto_mapping", "custom_generate", "megatron_config")
"""Keys by which a configuration names code that transformers or PEFT would import."""


def check_model_folder(folder: Path) -> None:
    """Refuse a folder whose files name code of their own, or cannot be read.

    Configurations are the files that transformers and PEFT may read as such: config.json and the
    versions of it that it can name, those of processor, tokenizer, generation and adapter.

    Args:
        folder: of a base or an adapter.

    Raises:
        BaseModelError: a configuration names code, or is not JSON; there is code for generation; or
            a file is a pipe, a device or a link to nothing.
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


def _is_pefts(key: str, value: Any) -> bool:
    """Whether it is what PEFT writes of a base's class in transformers."""
    library = value.get("parent_library") if isinstance(value, dict) else None
    in_transformers = isinstance(library, str) and library.startswith("transformers.models.")
    return key == "auto_mapping" and in_transformers
