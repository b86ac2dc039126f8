"""pairs.parquet: one image-text pair per row, with the bytes of its images.

`datasets.load_dataset("parquet", ...)` reads it directly; the images column has the layout of
`datasets.Image`.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NotRequired

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from medft.errors import DataError
from medft.files import finish_swap

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

_DEFAULT_METADATA = b'{"prompts": ["Describe this medical image."]}'
"""Of a file whose metadata another tool removed."""

_Templates = Annotated[list[str], Field(min_length=1)]

_ROWS_PER_GROUP = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupFacts:
    """How the group ids of pairs.parquet were made, for a later file that keeps its split."""

    key_id: str | None
    """What identifies the key they are hashed with; None if they are clear."""

    joined: dict[str, str]
    """The groups that were joined with another one, and the id of that."""


class _Metadata(TypedDict):
    """What medft writes into the metadata of pairs.parquet."""

    prompts: _Templates | dict[str, _Templates]
    """For rows without question: of every source, or by source."""

    groups: NotRequired[GroupFacts | None]


_METADATA = TypeAdapter(_Metadata)


def write_pairs(
    path: Path,
    rows: Iterable[dict[str, Any]],
    *,
    prompts: Mapping[str, list[str]],
    groups: GroupFacts,
) -> None:
    """Write pairs.parquet, with a few rows in memory at a time.

    Args:
        path: the file to write.
        rows: with every column of SCHEMA.
        prompts: for rows without question, by source.
        groups: how their group ids were made.
    """
    metadata = {
        "huggingface": json.dumps({"info": {"features": _features()}}),
        "medft": json.dumps({"prompts": dict(prompts), "groups": asdict(groups)}),
    }
    schema = SCHEMA.with_metadata(metadata)
    with _writer(path, schema) as writer:
        batches = batched(rows, _ROWS_PER_GROUP)
        for table in _ahead(pa.Table.from_pylist(batch, schema=schema) for batch in batches):
            writer.write_table(table)


def _ahead(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The tables; a thread builds the next one while the caller writes the current one."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, tables, None)
        while (table := coming.result()) is not None:
            coming = thread.submit(next, tables, None)
            yield table


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A writer that does not compress the images, which are compressed already."""
    plain = ["text", "question", "fields", "source", "group_id", "license", "split"]
    return pq.ParquetWriter(
        path, schema, use_dictionary=plain, compression=dict.fromkeys(plain, "snappy")
    )


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items; the last one may be shorter."""
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch


def group_facts(path: Path) -> GroupFacts | None:
    """How the group ids of pairs.parquet were made; None for a file of an older medft.

    Raises:
        DataError: the file cannot be read, or its metadata is not medft's.
    """
    return _metadata(path).get("groups")


def prompts_of(path: Path) -> dict[str, list[str]]:
    """The prompts that pairs.parquet was written with for rows without question, by source.

    Files of an older medft, and those without its metadata, have one list for all sources.

    Raises:
        DataError: the file cannot be read, or its metadata has no prompts.
    """
    prompts = _metadata(path)["prompts"]
    if isinstance(prompts, dict):
        return prompts
    sources = open_pairs(path).read(columns=["source"])["source"]
    return dict.fromkeys(sources.unique().to_pylist(), prompts)


def _metadata(path: Path) -> _Metadata:
    metadata = open_pairs(path).schema_arrow.metadata or {}
    try:
        return _METADATA.validate_json(metadata.get(b"medft", _DEFAULT_METADATA))
    except ValueError as error:
        raise DataError(
            f"expected prompts in the metadata of {path}, found others: write it with medft data "
            f"prepare"
        ) from error


def declared_by_source(path: Path) -> dict[str, list[str]]:
    """The prompts of each source that has rows without question."""
    rows = open_pairs(path).read(columns=["source", "question"])
    asked = rows.filter(rows["question"].is_null())["source"].unique().to_pylist()
    prompts = prompts_of(path)
    return {source: prompts[source] for source in asked if source in prompts}


def _features() -> dict[str, Any]:
    """The columns as features of `datasets`, which reads them from the file's metadata."""
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
        DataError: the file is not a pairs.parquet, or a row has no bytes for an image.
    """
    file = open_pairs(path)
    columns = [name for name in SCHEMA.names if images or name != "images"]
    for batch in file.iter_batches(batch_size=_ROWS_PER_GROUP, columns=columns):
        for row in batch.to_pylist():
            if images:
                check_row(path, row)
            yield row


def read_rows(path: Path, indices: Collection[int]) -> Iterator[dict[str, Any]]:
    """Some rows of pairs.parquet with their images, by index from 0, in the order of the file."""
    file = open_pairs(path)
    start = 0
    for number in range(file.num_row_groups):
        stop = start + file.metadata.row_group(number).num_rows
        wanted = [index - start for index in sorted(indices) if start <= index < stop]
        if wanted:
            yield from file.read_row_group(number).take(wanted).to_pylist()
        start = stop


def open_pairs(path: Path) -> pq.ParquetFile:
    """The opened file, its columns checked.

    Raises:
        DataError: it cannot be read or lacks a column.
    """
    try:
        finish_swap(path.parent)
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
    """Raise for a row whose image is a path, which would open a file of the reader's machine.

    Raises:
        DataError: an image has no bytes.
    """
    if not all(image and image["bytes"] for image in row["images"]):
        raise DataError(
            f"expected the bytes of every image in {path}, row {row['id']} has a path or nothing: "
            f"write the file with medft data prepare"
        )
