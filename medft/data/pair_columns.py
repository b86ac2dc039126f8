"""The columns of pairs.parquet, and what a row of a file that somebody else wrote must hold."""

import hashlib
from typing import Any

import pyarrow as pa
from pyarrow import types

from medft.data.json_rows import parsed
from medft.errors import DataError

SPLITS = ("train", "validation", "test")

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("width", pa.list_(pa.int32())),
        ("height", pa.list_(pa.int32())),
        ("sha256", pa.list_(pa.string())),
        ("phash", pa.list_(pa.string())),
        ("text", pa.string()),
        ("question", pa.string()),
        ("fields", pa.string()),
        ("source", pa.string()),
        ("group_id", pa.string()),
        ("license", pa.string()),
        ("split", pa.string()),
    ]
)
"""Columns of pairs.parquet; `fields` is a JSON object."""

MAX_CHARACTERS = 2**26
"""Of a text, at most."""

_TEXTS = [field.name for field in SCHEMA if field.type == pa.string()]
_MAY_BE_NULL = ("question", "fields", "license")
_LISTS = [name for name in SCHEMA.names if types.is_list(SCHEMA.field(name).type)]


def problem_of_columns(found: pa.Schema) -> str | None:
    """What is wrong with the columns of a file; None if they can be read as those of SCHEMA.

    Other tools write wider types: large strings, 64-bit integers, dictionaries.
    """
    twice = {name for name in found.names if found.names.count(name) > 1}
    missing = [name for name in SCHEMA.names if name not in found.names]
    if missing:
        return f"{', '.join(missing)} are missing"
    for field in SCHEMA:
        if field.name in twice:
            return f"{field.name} stands twice"
        other = found.field(field.name).type
        other = other.value_type if types.is_dictionary(other) else other
        if not _is_like(other, field.type):
            return f"{field.name} is of type {str(other)[:100]} instead of {field.type}"
    return None


def _is_like(found: pa.DataType, wanted: pa.DataType) -> bool:
    if types.is_null(found):  # no row has a value; rows are checked for those that must
        return True
    if types.is_list(wanted):
        is_list = types.is_list(found) or types.is_large_list(found)
        return is_list and _is_like(found.value_type, wanted.value_type)
    if types.is_struct(wanted):
        return types.is_struct(found) and all(
            found.get_field_index(part.name) >= 0
            and _is_like(found.field(part.name).type, part.type)
            for part in wanted
        )
    if types.is_integer(wanted):
        return types.is_integer(found)
    if types.is_binary(wanted):
        return types.is_binary(found) or types.is_large_binary(found)
    return types.is_string(found) or types.is_large_string(found)


def problem_of_row(row: dict[str, Any]) -> str | None:
    """What is wrong with a row; None if nothing is.

    Args:
        row: of any columns of SCHEMA; an image whose content is absent would be opened as a file
            of the reader's machine.
    """
    for name in _TEXTS:
        if name in row and (problem := _problem_of_text(name, row[name])):
            return problem
    if row.get("split", SPLITS[0]) not in SPLITS:
        return f"expected one of {', '.join(SPLITS)} as its split, got {row['split'][:40]!r}"
    if not _is_object(row.get("fields")):
        return "expected its fields to be a JSON object"
    lists = {name: row[name] for name in _LISTS if name in row}
    for name, values in lists.items():
        if not isinstance(values, list) or None in values:
            return f"expected a list of {name} without gaps"
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{count} {name}" for name, count in lengths.items())
        return f"expected a width, a height and hashes for each image, got {listed}"
    if not all(image["bytes"] for image in row.get("images", [])):
        return "expected the bytes of every image, one is a path or nothing"
    return _problem_of_hashes(lists) if {"images", "sha256"} <= lists.keys() else None


def _problem_of_hashes(row: dict[str, list[Any]]) -> str | None:
    """Hashes name images wherever rows are compared, so that a wrong one would mix them up."""
    for number, (image, known) in enumerate(zip(row["images"], row["sha256"], strict=True), 1):
        if hashlib.sha256(image["bytes"]).hexdigest() != known:
            return f"expected the SHA-256 of its images in sha256, image {number} has another"
    return None


def _problem_of_text(name: str, value: Any) -> str | None:
    if value is None:
        return None if name in _MAY_BE_NULL else f"expected text as its {name}, got nothing"
    if len(value) > MAX_CHARACTERS:
        return f"expected a {name} of at most {MAX_CHARACTERS} characters, it has {len(value)}"
    return None


def _is_object(fields: str | None) -> bool:
    if not fields:
        return True
    try:
        return isinstance(parsed(fields), dict)
    except (ValueError, RecursionError):
        return False


def bad_row(path: Any, row: dict[str, Any], number: int, problem: str) -> DataError:
    """The error of a row, which is named by its id, else by its number from 1."""
    name = row.get("id") or f"number {number}"
    return DataError(f"{path}: row {name}: {problem}: write the file with medft data prepare")
