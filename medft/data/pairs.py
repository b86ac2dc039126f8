"""pairs.parquet: one row an image-text pair, with the bytes of its images inside.

`datasets.load_dataset("parquet", ...)` reads it as it is; the images column has the layout of
`datasets.Image`.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from medft.data.images import decoded, plain_content, to_rgb
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

_ROWS_PER_GROUP = 64

# Rows 0 to 7 of the cosine transform of 32 samples, unnormalised: only medians are compared.
_COSINES = np.cos(np.pi * np.outer(np.arange(8), 2 * np.arange(32) + 1) / 64)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredImage:
    """A picture as pairs.parquet stores it."""

    content: bytes
    """A PNG or JPEG file."""

    name: str | None
    """The bare name of the file it came from."""

    width: int
    """Pixels."""

    height: int
    """Pixels."""

    sha256: str
    """Of `content`, in hexadecimal."""

    phash: str
    """64-bit perceptual hash, in hexadecimal."""

    thumbnail: bytes
    """32 x 32 grey values; kept in memory only, to compare pictures whose hashes are near."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One accepted row."""

    id: str
    images: list[StoredImage]
    text: str
    question: str | None
    fields: dict[str, Any] = field(default_factory=dict)
    source: str
    group_id: str
    license: str | None
    split: str = "train"

    def row(self) -> dict[str, Any]:
        """The row of pairs.parquet."""
        return {
            "id": self.id,
            "images": [{"bytes": image.content, "path": image.name} for image in self.images],
            "width": [image.width for image in self.images],
            "height": [image.height for image in self.images],
            "sha256": [image.sha256 for image in self.images],
            "phash": [image.phash for image in self.images],
            "text": self.text,
            "question": self.question,
            "fields": json.dumps(self.fields, sort_keys=True, ensure_ascii=False),
            "source": self.source,
            "group_id": self.group_id,
            "license": self.license,
            "split": self.split,
        }


def store_picture(
    content: bytes, *, name: str | None, max_pixels: int, max_side: int | None = None
) -> StoredImage:
    """A picture's file as pairs.parquet keeps it: as it came where that is plain, else as PNG.

    Args:
        content: of the file.
        name: of the file, without folder.
        max_pixels: width times height at the most.
        max_side: pixels; a larger picture is shrunk, antialiased.

    Raises:
        DataError: the picture cannot be used.
    """
    with decoded(content, max_pixels=max_pixels) as image:
        is_small = max_side is None or max(image.size) <= max_side
        plain = plain_content(content, image) if is_small else None
        if plain is not None:
            return _stored(plain, to_rgb(image), name)
        return store_image(to_rgb(ImageOps.exif_transpose(image)), name=name, max_side=max_side)


def store_image(
    image: Image.Image, *, name: str | None, max_side: int | None = None
) -> StoredImage:
    """An RGB image as a lossless PNG, shrunk where it is larger than max_side."""
    if max_side and max(image.size) > max_side:
        image = image.copy()
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return _stored(stream.getvalue(), image, name)


def _stored(content: bytes, image: Image.Image, name: str | None) -> StoredImage:
    grey = image.convert("L").resize((32, 32), Image.Resampling.BOX, reducing_gap=2.0)
    return StoredImage(
        content=content,
        name=name,
        width=image.width,
        height=image.height,
        sha256=hashlib.sha256(content).hexdigest(),
        phash=perceptual_hash(grey),
        thumbnail=grey.tobytes(),
    )


def perceptual_hash(thumbnail: Image.Image) -> str:
    """A 64-bit hash that near copies of a picture share, in hexadecimal.

    Args:
        thumbnail: 32 x 32, grey.

    The signs of the 8 x 8 lowest cosine frequencies of the thumbnail against their median, the
    constant term left out of the median.

    Source: the hash known as pHash; C. Zauner, Implementation and Benchmarking of Perceptual
    Image Hash Functions, 2010, section 3.2.1.
    """
    low = (_COSINES @ np.asarray(thumbnail, dtype=float) @ _COSINES.T).ravel()
    bits = low > np.median(low[1:])
    return f"{int(''.join('1' if bit else '0' for bit in bits), 2):016x}"


def write_pairs(path: Path, pairs: Iterable[Pair], *, prompts: list[str]) -> None:
    """Write pairs, and the prompts for those without question, a few rows in memory at a time."""
    metadata = {
        "huggingface": json.dumps({"info": {"features": _features()}}),
        "medft": json.dumps({"prompts": prompts}),
    }
    schema = SCHEMA.with_metadata(metadata)
    with pq.ParquetWriter(path, schema) as writer:
        for rows in batched((pair.row() for pair in pairs), _ROWS_PER_GROUP):
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def rewrite_splits(source: Path, target: Path, groups: list[str], splits: list[str]) -> None:
    """Copy a pairs file with other groups and splits; `target` is replaced once it is whole."""
    draft = target.with_name(f".{target.name}.draft")
    file = pq.ParquetFile(source)
    start = 0
    with pq.ParquetWriter(draft, file.schema_arrow) as writer:
        for index in range(file.num_row_groups):
            table = file.read_row_group(index)
            stop = start + table.num_rows
            for name, values in (("group_id", groups[start:stop]), ("split", splits[start:stop])):
                column = table.schema.get_field_index(name)
                table = table.set_column(column, SCHEMA.field(name), [values])
            writer.write_table(table)
            start = stop
    os.replace(draft, target)


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items, the last one shorter."""
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch


def prompts_of(path: Path) -> list[str]:
    """The prompts for rows without question that pairs.parquet was prepared with."""
    metadata = open_pairs(path).schema_arrow.metadata or {}
    return json.loads(metadata.get(b"medft", b'{"prompts": ["Describe this medical image."]}'))[
        "prompts"
    ]


def _features() -> dict[str, Any]:
    """The columns in the words of `datasets`, which reads them from the file's metadata."""
    texts = {field.name: {"dtype": "string", "_type": "Value"} for field in SCHEMA}
    numbers = {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"}
    hashes = {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"}
    images = {"feature": {"_type": "Image"}, "_type": "List"}
    lists = {"images": images, "width": numbers, "height": numbers, "sha256": hashes}
    return {**texts, **lists, "phash": hashes}


def read_pairs(path: Path, *, images: bool = True) -> Iterator[dict[str, Any]]:
    """The rows of pairs.parquet, one at a time.

    Args:
        path: the file.
        images: whether to read the column images.

    Raises:
        DataError: the file is no pairs.parquet, or a row has no bytes for an image.
    """
    file = open_pairs(path)
    columns = [name for name in SCHEMA.names if images or name != "images"]
    for batch in file.iter_batches(batch_size=_ROWS_PER_GROUP, columns=columns):
        for row in batch.to_pylist():
            if images:
                check_row(path, row)
            yield row


def open_pairs(path: Path) -> pq.ParquetFile:
    """The opened file, its columns checked.

    Raises:
        DataError: it cannot be read or lacks a column.
    """
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            f"expected a Parquet file at {path}, could not read it: write it with "
            f"medft data prepare"
        ) from error
    missing = [name for name in SCHEMA.names if name not in file.schema_arrow.names]
    if missing:
        raise DataError(
            f"expected the columns of pairs.parquet in {path}, {', '.join(missing)} are missing: "
            f"write it with medft data prepare"
        )
    return file


def check_row(path: Path, row: dict[str, Any]) -> None:
    """Refuse a row whose image is a path: it would open a file of the reader's machine.

    Raises:
        DataError: an image has no bytes.
    """
    if not all(image and image["bytes"] for image in row["images"]):
        raise DataError(
            f"expected the bytes of every image in {path}, row {row['id']} has a path or nothing: "
            f"write the file with medft data prepare"
        )
