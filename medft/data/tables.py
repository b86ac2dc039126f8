"""Rows of a source's table, whatever its format, one at a time.

A row is a mapping from column to value. A malformed row of a csv or jsonl file is yielded as a
Rejected, so that every row is accounted for; other malformed tables are errors. Missing columns are
an error before any work is done, see `medft.data.sources.check_columns`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medft.data.csv_rows import csv_rows
from medft.data.encoding import opened_table, read_text
from medft.data.json_rows import json_rows, jsonl_rows
from medft.data.parquet_parts import batches_of
from medft.data.source_file import inside
from medft.data.table_row import AS_WRITTEN, ReadOptions, TableCounts
from medft.data.table_row import Rejected as Rejected
from medft.data.table_row import TableRow as TableRow
from medft.data.template import text_of
from medft.errors import DataError

_MAX_PARQUET_BYTES = 2**50
"""Parquet is read in parts, whatever its size."""


def table_rows(
    kind: str,
    table: Path,
    options: ReadOptions = AS_WRITTEN,
    counts: TableCounts | None = None,
    *,
    columns: Sequence[str] | None = None,
) -> Iterator[TableRow | Rejected]:
    """The rows of a csv, json, jsonl or parquet file, or of an image folder's metadata.

    Args:
        kind: the format, or imagefolder.
        table: the file or folder.
        options: how it is read; cells that count as empty are "" in every row.
        counts: what is counted meanwhile.
        columns: all that is wanted, which spares the images inside a parquet file.

    Raises:
        DataError: the file is missing, has another format or encoding, names a column twice, or
            a quoted cell of it swallows rows.
    """
    counts = TableCounts() if counts is None else counts
    if kind == "imagefolder":
        kind, table = _metadata_of(table)
    for row in _rows(kind, table, options, counts, columns):
        yield row if isinstance(row, Rejected) else options.emptied(row, counts)


def tables_rows(
    kind: str,
    tables: Sequence[Path],
    options: ReadOptions,
    counts: TableCounts | None = None,
    *,
    columns: Sequence[str] | None = None,
) -> Iterator[TableRow | Rejected]:
    """The rows of several tables, as from `table_rows`, one table after another.

    The detail of a Rejected names its table where there are several.
    """
    for table in tables:
        own = TableCounts()
        for row in table_rows(kind, table, options, own, columns=columns):
            if isinstance(row, Rejected) and len(tables) > 1:
                yield Rejected(row.reason, f"{table.name}, {row.detail}")
            else:
                yield row
        if counts is not None:
            counts.add(own)


def first_row(kind: str, table: Path, options: ReadOptions) -> TableRow:
    """The first row of the table that is not rejected.

    Raises:
        DataError: there is none, or the table cannot be read.
    """
    problem = ""
    for row in table_rows(kind, table, options):
        if not isinstance(row, Rejected):
            return row
        problem = problem or f" that can be used ({row.reason}: {row.detail})"
    raise DataError(f"expected rows in {table}, found none{problem}: check the file")


def takes(row: TableRow, where: dict[str, Any] | None) -> bool:
    """Whether the cells of a row have the values that `where` requires."""
    for column, wanted in (where or {}).items():
        values = wanted if isinstance(wanted, list) else [wanted]
        if text_of(row.get(column)) not in {text_of(value) for value in values}:
            return False
    return True


def _metadata_of(folder: Path) -> tuple[str, Path]:
    for name in ("metadata.csv", "metadata.jsonl", "metadata.parquet"):
        if (folder / name).is_file():
            return name.partition(".")[2], _below(folder, name)
    raise DataError(
        f"expected metadata.csv, metadata.jsonl or metadata.parquet with a column file_name in "
        f"{folder}, found none: write one"
    )


def _below(folder: Path, name: str) -> Path:
    try:
        return inside(folder / name, folder.resolve())
    except Rejected as verdict:
        raise DataError(
            f"expected {name} in {folder}, it is a link that leaves the folder: put the file there"
        ) from verdict


def _rows(
    kind: str,
    table: Path,
    options: ReadOptions,
    counts: TableCounts,
    columns: Sequence[str] | None,
) -> Iterator[TableRow | Rejected]:
    if kind == "parquet":
        return _parquet_rows(table, options.encoding, columns)
    text = read_text(table, options.encoding)
    if kind == "csv":
        return csv_rows(text, table, options.names_image, counts)
    return jsonl_rows(text) if kind == "jsonl" else json_rows(text, table)


def _parquet_rows(
    table: Path, encoding: str | None, columns: Sequence[str] | None
) -> Iterator[TableRow]:
    if encoding is not None:
        raise DataError(f"expected no encoding for {table}, Parquet is UTF-8: remove encoding")
    try:
        file = pq.ParquetFile(opened_table(table, max_bytes=_MAX_PARQUET_BYTES))
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            raise DataError(
                f"expected different column names in {table}, got {', '.join(names)}: rename one"
            )
        for batch in batches_of(table, file, columns):
            yield from batch.to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(
            f"expected a Parquet file at {table}, could not read it ({error}): check the path"
        ) from error
