"""Rows to train on, read from chat JSONL or from pairs.parquet, and checked.

A row has the same form whatever file it is from. All rows are checked before a model is loaded; an
error names a bad row by its id or its line number.
"""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Image, List, Value

from medft.data.messages import (
    Message,
    conversation,
    is_empty,
    normalized_messages,
    paths_of_parts,
)
from medft.data.pairs import check_row, open_pairs, prompts_of
from medft.errors import DataError
from medft.files import file_sha256

SHOWN_PROBLEMS = 10
"""Bad rows that an error lists; further ones are only counted."""

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


_ROW_KEYS = {"id", "group_id", "source", "images", "image", "messages", "fields"}

_FOREIGN_KEYS = {
    **dict.fromkeys(("weight", "train", "loss"), "every row is trained alike: remove it"),
    **dict.fromkeys(("tools", "tool_calls"), "no tool calls are trained: remove it"),
    **dict.fromkeys(("chosen", "rejected"), "no preferences are trained: remove it"),
    **dict.fromkeys(("videos", "audios"), "images alone are read: remove it"),
    "objects": "no boxes are read: write them into the texts",
    "system": "a system prompt is the first message: write it there, with the role system",
    "conversations": "turns are messages of role and content: write messages in its place",
}
"""Keys of a row that other tools obey; what medft does, and what to do."""

_NO_ROWS = Dataset.from_dict({})

OWN_GROUP = "row/"
"""Begins the group of a row without one, which is then a group of its own."""


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
    if not path.is_file():
        raise DataError(f"expected a data file at {path}, there is none: check the path")
    if path.stat().st_size == 0:
        raise DataError(f"expected rows in {path}, the file is empty: prepare it again")
    state, digest = _state(path), file_sha256(path)
    is_pairs = path.suffix == ".parquet"
    rows = _pairs_dataset(path, split, _cache_of(digest)) if is_pairs else _jsonl_dataset(path)
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
    return {"path": str(path), "sha256": checksums[str(path)]["checksum"], "rows": len(rows)}


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
    splits = open_pairs(path).read(columns=["split"]).column("split").to_pylist()
    chosen = [index for index, name in enumerate(splits) if name == split]
    if not chosen:
        return _NO_ROWS
    columns = ["id", "group_id", "source", "images", "sha256", "text", "question", "fields"]
    dataset = Dataset.from_parquet(str(path), columns=columns, cache_dir=str(cache))
    dataset = dataset.cast_column("images", List(Image(decode=False))).select(chosen)
    messages = []
    for row in dataset:
        check_row(path, row)
        messages.append(json.dumps(conversation(row, prompts), ensure_ascii=False))
    return dataset.remove_columns(["text", "question"]).add_column("messages", messages)


def _jsonl_dataset(path: Path) -> Dataset:
    rows, problems = [], []
    folder = path.parent
    existing: dict[str, bool] = {}
    names: Counter[str] = Counter()
    for number, line in _numbered_lines(path):
        try:
            row = _checked_row(line, number, folder, existing)
            names[row["id"]] += 1
            if names[row["id"]] > 1:  # some files use the image's id as that of a row
                row["id"] = f"{row['id']} (line {number})"
            rows.append(row)
        except DataError as error:
            problems.append(f"{path}:{number}: {error}")
    if problems:
        more = len(problems) - SHOWN_PROBLEMS
        rest = [f"{path}: {more} more rows are bad: correct them too"] if more > 0 else []
        raise DataError(*islice(problems, SHOWN_PROBLEMS), *rest)
    return Dataset.from_list(rows, features=_FEATURES) if rows else _NO_ROWS


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        raise DataError(f"expected UTF-8 text in {path}, found other bytes: convert it") from error


def _checked_row(line: str, number: int, folder: Path, existing: dict[str, bool]) -> dict[str, Any]:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise DataError(f"expected a JSON object, could not parse it ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"expected a JSON object, got {type(row).__name__}")
    name = f"line {number}" if row.get("id") is None else str(row["id"])
    fields = _fields(row, name)
    paths = _image_paths(row, folder, name)
    messages = normalized_messages(row.get("messages"), len(paths), name)
    images = []
    for path in paths:
        whole = os.path.join(folder, path)  # an absolute path stays as it is
        if whole not in existing:
            existing[whole] = os.path.isfile(whole)
        if not existing[whole]:
            raise DataError(f"row {name}: expected an image at {whole}, there is no file")
        images.append({"bytes": None, "path": whole})
    group = row.get("group_id")
    return {
        "id": name,
        "group_id": f"{OWN_GROUP}{name}" if is_empty(group) else str(group),
        "source": str(row.get("source") or ""),
        "images": images,
        "messages": json.dumps(messages, ensure_ascii=False),
        "fields": json.dumps(fields, ensure_ascii=False),
    }


def _fields(row: dict[str, Any], name: str) -> dict[str, Any]:
    """The columns under `fields` and the keys of the row that have no meaning for medft."""
    further = {key: value for key, value in row.items() if key not in _ROW_KEYS}
    for key, value in further.items():
        if key in _FOREIGN_KEYS and not is_empty(value):
            raise DataError(
                f"row {name}: expected no key {key}, {_FOREIGN_KEYS[key]}, or put it under fields "
                f"if it is a column of the data"
            )
        if re.search(r"image|img|pic", key):
            raise DataError(
                f"row {name}: expected the key images, got {key}: rename it, or "
                f"put it under fields if it is a column of the data"
            )
    fields = row.get("fields")
    if fields is None:
        return further
    if not isinstance(fields, dict):
        raise DataError(
            f"row {name}: expected fields to be an object, got {type(fields).__name__}: write "
            f"columns and their values"
        )
    twice = sorted(further.keys() & fields.keys())
    if twice:
        raise DataError(
            f"row {name}: expected each column once, {twice[0]} stands in the row and in its "
            f"fields: remove one"
        )
    return {**further, **fields}


def _image_paths(row: dict[str, Any], folder: Path, name: str) -> list[str]:
    """The paths of a row's images, in the order in which its messages show them."""
    if row.get("images") and row.get("image"):
        raise DataError(f"row {name}: expected the key images or image, got both: remove image")
    listed = row.get("images") or ([row["image"]] if row.get("image") else [])
    if not isinstance(listed, list) or not all(isinstance(path, str) for path in listed):
        raise DataError(f"row {name}: expected images to be a list of paths")
    own = paths_of_parts(row.get("messages"), name)
    if own and listed and (len(listed) > len(own) or _files(listed, folder) != _files(own, folder)):
        raise DataError(
            f"row {name}: expected images to name the files of the image parts, got "
            f"{', '.join(listed)} and {', '.join(own)}: remove images, the parts decide"
        )
    for path in own or listed:
        if re.match(r"(https?|ftp|s3|gs|file|data):", path, re.IGNORECASE):
            raise DataError(
                f"row {name}: expected the path of an image file, got {path[:60]!r}: put the file "
                f"beside the rows and name it"
            )
    return own or listed


def _files(paths: list[str], folder: Path) -> set[str]:
    return {os.path.normpath(os.path.join(folder, path)) for path in paths}
