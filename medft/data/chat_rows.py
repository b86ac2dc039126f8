"""Rows of a chat JSONL, checked one by one; an error names a row by its id or its line number."""

import itertools
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from medft.data.images import opened
from medft.data.json_rows import parsed
from medft.data.messages import is_empty, normalized_messages, paths_of_parts
from medft.data.pair_columns import MAX_CHARACTERS
from medft.data.source_file import open_regular
from medft.data.table_row import Rejected
from medft.errors import DataError

SHOWN_PROBLEMS = 10
"""Bad rows that an error lists; further ones are only counted."""

_MAX_LINE_BYTES = 4 * MAX_CHARACTERS
"""Of a row; a character has four bytes at most."""

OWN_GROUP = "row/"
"""Begins the group of a row without one, which is then a group of its own."""

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


def chat_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a chat JSONL, in the columns of `medft.data.rows.load_rows`.

    The header of each image is read: that it is one, and not too large. Its pixels are not.

    Raises:
        DataError: rows are bad; it has a sentence for each of the first.
    """
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    known: dict[str, str | None] = {}
    names: Counter[str] = Counter()
    for number, line in _numbered_lines(path):
        try:
            row = _checked_row(line, number, path.parent, known)
            names[row["id"]] += 1
            if names[row["id"]] > 1:  # some files use the image's id as that of a row
                row["id"] = f"{row['id']} (line {number})"
            rows.append(row)
        except DataError as error:
            problems.append(f"{path}:{number}: {error}")
    raise_listed(path, problems)
    return rows


def raise_listed(path: Path, problems: list[str]) -> None:
    """Raise the first SHOWN_PROBLEMS of a file, the others counted; nothing if there is none.

    Raises:
        DataError: with a sentence for each.
    """
    if problems:
        more = len(problems) - SHOWN_PROBLEMS
        rest = [f"{path}: {more} more rows are bad: correct them too"] if more > 0 else []
        raise DataError(*islice(problems, SHOWN_PROBLEMS), *rest)


def problem_of_header(source: Path | bytes) -> str | None:
    """Why `open_image` would refuse an image before it decodes it; None if it would not."""
    try:
        with opened(source):
            return None
    except DataError as error:
        return str(error)


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1.

    Raises:
        DataError: the file is none, or a line is no UTF-8 or longer than any conversation.
    """
    try:
        file = open_regular(path, max_bytes=sys.maxsize)
    except (OSError, Rejected) as error:
        raise DataError(f"expected a data file at {path}, could not read it: check it") from error
    with file:
        for number in itertools.count(1):
            line = file.readline(_MAX_LINE_BYTES + 1)
            if not line:
                return
            if len(line) > _MAX_LINE_BYTES:
                raise DataError(
                    f"{path}:{number}: expected a JSON object, the line has more than "
                    f"{_MAX_LINE_BYTES} bytes: write a row a line"
                )
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number}: expected UTF-8 text, found other bytes: convert the file"
                ) from error
            if text.strip():
                yield number, text


def _checked_row(
    line: str, number: int, folder: Path, known: dict[str, str | None]
) -> dict[str, Any]:
    try:
        row = parsed(line)
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
        if whole not in known:
            known[whole] = _problem_of_image(whole)
        if known[whole]:
            raise DataError(f"row {name}: {known[whole]}")
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


def _problem_of_image(path: str) -> str | None:
    if not os.path.exists(path):
        return f"expected an image at {path}, there is no file"
    if not os.path.isfile(path):
        return f"expected an image at {path}, it is a folder, a pipe or a device"
    return problem_of_header(Path(path))


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
