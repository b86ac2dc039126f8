"""Rows to train on, read from chat JSONL or from pairs.parquet, and checked.

A row has the same form whatever file it is from. All rows are checked before a model is loaded; an
error names a bad row by its id or its line number.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value

from medft.data.messages import Message, conversation, normalized_messages
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


_ROW_KEYS = {"id", "group_id", "source", "images", "image", "messages"}

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
    rows = _pairs_dataset(path, split) if path.suffix == ".parquet" else _jsonl_dataset(path)
    if len(rows) == 0:
        raise DataError(f"expected rows of split {split} in {path}, found none: check the file")
    return rows


def image_source(image: dict[str, Any]) -> Path | bytes:
    """The content or path of an entry of a row's images, as `open_image` takes it."""
    return image["bytes"] if image["bytes"] is not None else Path(image["path"])


def fingerprint(path: Path, rows: Dataset) -> dict[str, Any]:
    """Identity of a run's data: path, SHA-256 of the file, number of rows."""
    return {"path": str(path), "sha256": file_sha256(path), "rows": len(rows)}


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


def _pairs_dataset(path: Path, split: str) -> Dataset:
    prompts = prompts_of(path)
    splits = open_pairs(path).read(columns=["split"]).column("split").to_pylist()
    chosen = [index for index, name in enumerate(splits) if name == split]
    if not chosen:
        return _NO_ROWS
    columns = ["id", "group_id", "source", "images", "sha256", "text", "question", "fields"]
    dataset = Dataset.from_parquet(str(path), columns=columns)
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
    paths = row.get("images") or ([row["image"]] if row.get("image") else [])
    unread = sorted(key for key in row.keys() - _ROW_KEYS if re.search(r"image|img|pic", key))
    if unread:
        raise DataError(f"row {name}: expected the key images, got {unread[0]}: rename it")
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise DataError(f"row {name}: expected images to be a list of paths")
    messages = normalized_messages(row.get("messages"), len(paths), name)
    images = []
    for path in paths:
        whole = os.path.join(folder, path)  # an absolute path stays as it is
        if whole not in existing:
            existing[whole] = os.path.isfile(whole)
        if not existing[whole]:
            raise DataError(f"row {name}: expected an image at {whole}, there is no file")
        images.append({"bytes": None, "path": whole})
    fields = {key: value for key, value in row.items() if key not in _ROW_KEYS}
    group = row.get("group_id")
    return {
        "id": name,
        "group_id": f"{OWN_GROUP}{name}" if group is None else str(group),
        "source": str(row.get("source") or ""),
        "images": images,
        "messages": json.dumps(messages, ensure_ascii=False),
        "fields": json.dumps(fields, ensure_ascii=False),
    }
