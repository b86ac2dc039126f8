"""Rows of a source's table, whatever its format, one at a time.

A row is a mapping from column to value. A malformed row of a csv file is yielded as a Rejected, so
that every row is accounted for; other malformed tables are errors. Missing columns are an error
before any work is done, see `medft.data.sources.check_columns`.
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medft.data.template import text_of
from medft.errors import DataError

TableRow = dict[str, Any]


class Rejected(Exception):
    """A rejected row: a reason code and what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def table_rows(kind: str, table: Path) -> Iterator[TableRow | Rejected]:
    """The rows of a csv, json, jsonl or parquet file, or of an image folder's metadata.

    Raises:
        DataError: the file is missing, has another format, or names a column twice.
    """
    if kind == "imagefolder":
        kind, table = _metadata_of(table)
    if kind == "parquet":
        yield from _parquet_rows(table)
    elif kind == "csv":
        yield from _csv_rows(_read_text(table), table)
    else:
        yield from _json_rows(_read_text(table), table, kind)


def first_row(kind: str, table: Path) -> TableRow:
    """The first row of the table that is not rejected.

    Raises:
        DataError: there is none.
    """
    for row in table_rows(kind, table):
        if isinstance(row, dict):
            return row
    raise DataError(f"expected rows in {table}, found none: check the file")


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
            return name.partition(".")[2], folder / name
    raise DataError(
        f"expected metadata.csv, metadata.jsonl or metadata.parquet with a column file_name in "
        f"{folder}, found none: write one"
    )


def _read_text(table: Path) -> str:
    """Text of a file in UTF-8, with or without BOM, else in Latin-1, which decodes every byte."""
    try:
        content = table.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(
            f"expected a table at {table}, could not read it ({reason}): check the path"
        ) from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _csv_rows(text: str, table: Path) -> Iterator[TableRow | Rejected]:
    try:
        delimiter = csv.Sniffer().sniff(text[:65536].partition("\n")[0], ",;\t|").delimiter
    except csv.Error:
        delimiter = ","
    csv.field_size_limit(1 << 30)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if len(set(header)) < len(header):
            raise DataError(
                f"expected different column names in {table}, got {', '.join(header)}: rename one"
            )
        for cells in reader:
            further = [cell for cell in cells[len(header) :] if cell.strip()]
            if cells and (further or len(cells) < len(header)):
                yield Rejected("wrong_cell_count", f"{len(cells)} cells for {len(header)} columns")
            elif cells:
                yield dict(zip(header, cells, strict=False))
    except csv.Error as error:
        raise DataError(
            f"expected csv in {table}, could not parse it ({error}): check its kind"
        ) from error


def _json_rows(text: str, table: Path, kind: str) -> Iterator[TableRow]:
    try:
        lines = (line.strip() for line in io.StringIO(text))
        rows = json.loads(text) if kind == "json" else map(json.loads, filter(None, lines))
        if not isinstance(rows, list | map):
            raise DataError(
                f"expected a list of objects in {table}, got {type(rows).__name__}: check its kind"
            )
        for row in rows:
            if not isinstance(row, dict):
                raise DataError(
                    f"expected objects in {table}, got {type(row).__name__}: check its kind"
                )
            yield row
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"expected {kind} in {table}, could not parse it ({error}): check its kind"
        ) from error


def _parquet_rows(table: Path) -> Iterator[TableRow]:
    try:
        for batch in pq.ParquetFile(table).iter_batches(batch_size=64):
            yield from batch.to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            f"expected a Parquet file at {table}, could not read it ({error}): check the path"
        ) from error
