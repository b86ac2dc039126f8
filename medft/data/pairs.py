"""pairs.parquet: one image-text pair per row, with the bytes of its images.

`datasets.load_dataset("parquet", ...)` reads it directly; the images column has the layout of
`datasets.Image`.
"""

import json
from collections import Counter
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

from medft.data.pair_columns import SCHEMA as SCHEMA
from medft.data.pair_columns import SPLITS as SPLITS
from medft.data.pair_columns import bad_row, problem_of_columns, problem_of_row
from medft.data.parquet_parts import ROWS_AT_A_TIME, batches_of
from medft.errors import DataError
from medft.files import finish_swap

_DEFAULT_METADATA = b'{"prompts": ["Describe this medical image."]}'
"""Of a file whose metadata another tool removed."""

_Templates = Annotated[list[str], Field(min_length=1)]


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

    images: NotRequired[str]
    """"decoded" where every image was decoded before it was written."""


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
        rows: with every column of SCHEMA; their images were decoded, which the file records.
        prompts: for rows without question, by source.
        groups: how their group ids were made.
    """
    metadata = {
        "huggingface": json.dumps({"info": {"features": _features()}}),
        "medft": json.dumps(
            {"prompts": dict(prompts), "groups": asdict(groups), "images": "decoded"}
        ),
    }
    schema = SCHEMA.with_metadata(metadata)
    with _writer(path, schema) as writer:
        batches = batched(rows, ROWS_AT_A_TIME)
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
    sources = (batch["source"].unique().to_pylist() for batch in _batches(path, ["source"]))
    return dict.fromkeys((source for found in sources for source in found), prompts)


def images_were_decoded(path: Path) -> bool:
    """Whether pairs.parquet says that all its images were decoded when it was written."""
    return _metadata(path).get("images") == "decoded"


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
    asked: dict[str, None] = {}
    for rows in _batches(path, ["source", "question"]):
        asked.update(dict.fromkeys(rows.filter(rows["question"].is_null())["source"].to_pylist()))
    prompts = prompts_of(path)
    return {source: prompts[source] for source in asked if source in prompts}


def rows_by_split(path: Path) -> Counter[str]:
    """Number of rows of each split of pairs.parquet.

    Raises:
        DataError: the file cannot be read.
    """
    return Counter(name for batch in _batches(path, ["split"]) for name in batch[0].to_pylist())


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
    columns = [name for name in SCHEMA.names if images or name != "images"]
    number = 0
    for batch in _batches(path, columns):
        for row in _rows_of(path, batch):
            number += 1
            problem = problem_of_row(row)
            if problem:
                raise bad_row(path, row, number, problem)
            yield row


def _rows_of(path: Path, batch: pa.RecordBatch) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except ValueError as error:
        raise _unreadable(path, error) from error


def _batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Some columns, a few rows at a time, however little room they take in the file.

    Raises:
        DataError: the file is damaged, or holds far more than its size.
    """
    try:
        yield from batches_of(path, open_pairs(path), columns)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


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
        DataError: it cannot be read, or lacks a column or has one of another type.
    """
    try:
        finish_swap(path.parent)
        check_regular(path)
        file = pq.ParquetFile(path)
        problem = problem_of_columns(file.schema_arrow)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error
    if problem:
        raise DataError(
            f"expected the columns of pairs.parquet in {path}, {problem}: write it with medft data "
            f"prepare"
        )
    return file


def check_regular(path: Path) -> None:
    """Check, before it is opened, that a path is one of a regular file.

    Raises:
        DataError: it is missing, or a folder, a pipe or a device.
    """
    if not path.exists():
        raise DataError(f"expected a data file at {path}, there is none: check the path")
    if not path.is_file():
        raise DataError(
            f"expected a data file at {path}, it is a folder, a pipe or a device: check the path"
        )


def _unreadable(path: Path, error: Exception) -> DataError:
    problem = " ".join(str(error).split())[:200]
    return DataError(
        f"expected a Parquet file at {path}, could not read it ({problem}): write it with medft "
        f"data prepare"
    )
