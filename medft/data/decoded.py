"""Decodes the images of rows before training, as training will."""

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from datasets import Dataset
from tqdm import tqdm

from medft.data.images import open_image
from medft.data.pairs import batched
from medft.data.rows import image_source
from medft.errors import DataError

_CHUNK = 64
"""Rows whose images are in memory at once, encoded."""

_THREADS = 8
"""Images that are decoded at once, at most: each may take a gigabyte."""

_Named = tuple[str, str | bytes, Path | bytes]
"""A row's id, what tells its image from others, and the image as `open_image` takes it."""


def decode_images(datasets: Sequence[Dataset]) -> int:
    """Decode every image of datasets from `load_rows`, once each; returns how many there are.

    Raises:
        DataError: with a sentence for each row whose image cannot be decoded.
    """
    known: dict[str | bytes, str | None] = {}
    problems: list[str] = []
    progress = tqdm(total=sum(map(len, datasets)), desc="images", disable=not sys.stderr.isatty())
    # Pillow decodes without holding the interpreter's lock
    with progress, ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        for rows in datasets:
            for chunk in batched(rows.select_columns(["id", "images"]), _CHUNK):
                named = [image for row in chunk for image in _named(row)]
                new = {key: source for _, key, source in named if key not in known}
                known.update(zip(new, threads.map(_problem_of, new.values()), strict=True))
                problems += [f"row {name}: {p}" for name, key, _ in named if (p := known[key])]
                progress.update(len(chunk))
    if problems:
        raise DataError(*problems)
    return len(known)


def _named(row: dict) -> Iterator[_Named]:
    for image in row["images"]:
        source = image_source(image)
        key = str(source) if isinstance(source, Path) else hashlib.sha256(source).digest()
        yield row["id"], key, source


def _problem_of(source: Path | bytes) -> str | None:
    try:
        open_image(source)
    except DataError as error:
        return str(error)
    return None
