"""Rows to train on, read from chat JSONL or from pairs.parquet, and checked.

A row has the same form whatever file it is from. All rows are checked before a model is loaded; an
error names a bad row by its id or its line number.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Image, List, Value

from medft.data.chat_rows import chat_rows, problem_of_header, raise_listed
from medft.data.messages import Message, conversation
from medft.data.pairs import (
    check_regular,
    images_were_decoded,
    open_pairs,
    prompts_of,
    read_pairs,
)
from medft.errors import DataError
from medft.files import file_sha256

_FEATURES = Features(
    {
        "id": Value("string"),
        "group_id": Value("string"),
        "source": Value("string"),
        "images": List(Image(decode=False)),
        "messages": Value("string"),
        "fields": Value("string"),
    }
)


_PAIRS_FEATURES = Features(
    {
        **{name: kind for name, kind in _FEATURES.items() if name != "messages"},
        "sha256": List(Value("string")),
    }
)
"""Of pairs.parquet, whatever its own metadata says; messages come from its other columns."""

_NO_ROWS = Dataset.from_dict({})


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A row to train on or to evaluate, in the same form whatever file it is from."""

    id: str
    group_id: str
    """Equal for rows of one patient or study; empty where the column was not read."""

    source: str
    """Empty where there is none, or the column was not read."""

    images: list[Path | bytes]
    """Files or their content, as `open_image` takes them; empty where the column was not read."""

    messages: list[Message]
    fields: dict[str, Any]
    """Further columns of the row's source."""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Row":
        """A row of a dataset from `load_rows`, which may lack any column but id and messages."""
        return cls(
            id=record["id"],
            group_id=record.get("group_id") or "",
            source=record.get("source") or "",
            images=[image_source(image) for image in record.get("images", [])],
            messages=json.loads(record["messages"]),
            fields=json.loads(record.get("fields") or "{}"),
        )


def load_rows(path: Path, *, split: str) -> Dataset:
    """The rows of a chat JSONL, or of one split of pairs.parquet, checked.

    Returns:
        A dataset with the columns id (a repeated one of a JSONL gets its line number appended),
        group_id, source, images (bytes or path), messages (JSON) and fields (JSON), and from
        pairs.parquet sha256 (of each image); `Row.of` reads a row of it.

    Raises:
        DataError: the file is missing, empty or of another format, or has bad rows.
    """
    check_regular(path)
    if path.stat().st_size == 0:
        raise DataError(f"expected rows in {path}, the file is empty: prepare it again")
    state = _state(path)
    if path.suffix == ".parquet":
        open_pairs(path)  # what is no pairs.parquet is not read to its end
        digest = file_sha256(path)
        rows = _pairs_dataset(path, split, _cache_of(digest))
    else:
        found = chat_rows(path)
        rows = Dataset.from_list(found, features=_FEATURES) if found else _NO_ROWS
        digest = file_sha256(path)
    if _state(path) != state:
        shutil.rmtree(_cache_of(digest), ignore_errors=True)  # may hold the rows of either state
        raise DataError(
            f"expected {path} to stay as it is while it is read, it was changed meanwhile: start "
            f"again once it is written"
        )
    if len(rows) == 0:
        raise DataError(f"expected rows of split {split} in {path}, found none: check the file")
    rows.info.download_checksums = {str(path): {"num_bytes": state[0], "checksum": digest}}
    return rows


def _state(path: Path) -> tuple[int, ...]:
    """What differs once a file is written anew, also where its modification time is put back."""
    try:
        state = path.stat()
    except OSError:  # removed
        return ()
    return state.st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns


def _cache_of(digest: str) -> Path:
    """Where datasets keeps its copy of a pairs.parquet, which it maps into memory.

    By content: its own key for a file, path and modification time, can be that of older rows.
    """
    return Path(datasets.config.HF_DATASETS_CACHE) / "medft" / digest


def image_source(image: dict[str, Any]) -> Path | bytes:
    """The content or path of an entry of a row's images, as `open_image` takes it."""
    return image["bytes"] if image["bytes"] is not None else Path(image["path"])


def fingerprint(path: Path, rows: Dataset) -> dict[str, Any]:
    """Identity of a run's data: path, SHA-256 of the file as it was read, number of rows.

    Args:
        path: the file.
        rows: as `load_rows` gave them.
    """
    checksums = rows.info.download_checksums or {}
    name = f"./{path}" if path.parts[0] == "~" else str(path)  # a folder of that name, not home
    return {"path": name, "sha256": checksums[str(path)]["checksum"], "rows": len(rows)}


def describe_counts(counts: dict[str, Any]) -> str:
    """Counts as text such as "rows kept 200; rows dropped 3; images a row 1: 190, 2: 10"."""
    known = ((name, value) for name, value in counts.items() if value is not None)
    return "; ".join(f"{name.replace('_', ' ')} {_shown(value)}" for name, value in known)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {count}" for name, count in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return " = ".join(map(repr, value)) if isinstance(value, list) else str(value)


def _pairs_dataset(path: Path, split: str, cache: Path) -> Dataset:
    prompts = prompts_of(path)
    were_decoded = images_were_decoded(path)
    chosen, messages, problems = [], [], []
    for index, row in enumerate(read_pairs(path)):
        if row["split"] != split:
            continue
        chosen.append(index)
        messages.append(json.dumps(conversation(row, prompts), ensure_ascii=False))
        for image in [] if were_decoded else row["images"]:
            if problem := problem_of_header(image["bytes"]):
                problems.append(f"{path}: row {row['id']}: {problem}")
    raise_listed(path, problems)
    if not chosen:
        return _NO_ROWS
    dataset = Dataset.from_parquet(
        str(path), features=_PAIRS_FEATURES, columns=list(_PAIRS_FEATURES), cache_dir=str(cache)
    )
    return dataset.select(chosen).add_column("messages", messages)
