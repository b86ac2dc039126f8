"""Rows that stand in training and elsewhere: of one group, or with the same images and text."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from medft.data.chat_rows import OWN_GROUP
from medft.data.messages import text_of_message
from medft.errors import DataError
from medft.files import file_sha256

SHOWN_ROWS = 3
"""Ids of rows that the error names."""

_Key = tuple[str, tuple[str, ...]]
"""A row's text, hashed, and its images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """Rows of another data file that training has seen, or whose group it has."""

    rows: list[str]
    """Ids of the rows that share a group, or images and text, with a training row."""

    groups: int
    """Number of groups in both."""

    same_rows: list[str]
    """Ids of the rows with the images and text of a training row."""

    @property
    def same(self) -> int:
        """Number of the rows with the images and text of a training row."""
        return len(self.same_rows)

    @property
    def record(self) -> dict[str, int]:
        """The counts."""
        return {"rows": len(self.rows), "groups": self.groups, "same": self.same}


def find_overlap(train: Dataset, other: Dataset) -> Overlap:
    """What `other` shares with `train`.

    Text is what the assistant says. A row without group is compared by images and text alone.

    Args:
        train: rows from `load_rows`.
        other: rows from `load_rows`.
    """
    shared = _groups(train) & _groups(other)
    keys, known = _keys(train, other)
    same = {index for index, key in enumerate(keys) if key in known}
    names = list(zip(other["id"], other["group_id"], strict=True))
    return Overlap(
        rows=[n for i, (n, group) in enumerate(names) if group in shared or i in same],
        groups=len(shared),
        same_rows=[n for i, (n, _) in enumerate(names) if i in same],
    )


def check_overlap(train: Dataset, validation: Dataset, *, is_allowed: bool) -> dict[str, Any]:
    """The counts of the overlap for run.json; empty if there is none.

    Args:
        train: rows from `load_rows`.
        validation: rows from `load_rows`.
        is_allowed: `data.allow_overlap`.

    Raises:
        DataError: there is some, and it is not allowed.
    """
    found = find_overlap(train, validation)
    if not found.rows:
        return {}
    if not is_allowed:
        raise DataError(
            f"expected validation rows that training has not seen, {len(found.rows)} of "
            f"{len(validation)} share a group with training ({found.groups} groups) or have its "
            f"images and text ({found.same} rows), first {', '.join(found.rows[:SHOWN_ROWS])}: "
            f"split by group, or write data.allow_overlap: true, which is recorded"
        )
    return {"overlap": found.record}


def _groups(rows: Dataset) -> set[str]:
    return {group for group in rows.unique("group_id") if not group.startswith(OWN_GROUP)}


def _keys(train: Dataset, other: Dataset) -> tuple[list[_Key | None], set[_Key]]:
    """Keys of the rows of `other`, None where no training row has the text, and of `train`."""
    texts = [_texts(rows) for rows in (train, other)]
    both = set(texts[0]) & set(texts[1])
    sides = [
        [images if text in both else [] for text, images in zip(own, _images(rows), strict=True)]
        for own, rows in zip(texts, (train, other), strict=True)
    ]
    names = _names(*({image for row in side for image in row} for side in sides))
    keys = [
        [
            (text, tuple(names[image] for image in row)) if text in both else None
            for text, row in zip(own, side, strict=True)
        ]
        for own, side in zip(texts, sides, strict=True)
    ]
    return keys[1], {key for key in keys[0] if key is not None}


def _texts(rows: Dataset) -> list[str]:
    """The hash of what the assistant says in each row."""
    found = []
    for messages in rows["messages"]:
        said = [text_of_message(m) for m in json.loads(messages) if m["role"] == "assistant"]
        found.append(hashlib.sha256(json.dumps(said).encode()).hexdigest())
    return found


def _images(rows: Dataset) -> Iterator[list[str | Path]]:
    """Each row's images: their hashes where these are known, else their files."""
    if "sha256" in rows.column_names:
        yield from rows["sha256"]
        return
    for images in rows["images"]:
        paths = [Path(image["path"]) for image in images]
        # medft names an image that it writes by its hash
        yield [p.stem if re.fullmatch(r"[0-9a-f]{64}", p.stem) else p for p in paths]


def _names(one: set[str | Path], other: set[str | Path]) -> dict[str | Path, str]:
    """What is equal for equal images: hashes; a file is read only if another has as many bytes."""
    files = [{image for image in side if isinstance(image, Path)} for side in (one, other)]
    sizes = {path: os.path.getsize(path) for path in files[0] | files[1]}
    read = set(sizes)
    if files == [one, other]:
        alike = {sizes[path] for path in files[0]} & {sizes[path] for path in files[1]}
        read = {path for path in sizes if sizes[path] in alike}
    return {
        image: file_sha256(image) if isinstance(image, Path) and image in read else str(image)
        for image in one | other
    }
