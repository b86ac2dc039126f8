"""Parquet in parts of bounded size: a few rows at a time, however little room they take on disk."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medft.errors import DataError

ROWS_AT_A_TIME = 64
"""Rows of a batch at most."""

_BATCH_BYTES = 2**26
"""Bytes of a batch of rows, as far as the file says how much its columns hold."""

_LIMIT_FACTOR = 32
_LIMIT_BYTES = 2**30
"""A file may hold so many bytes, and so many times its own size, once it is decoded."""


def batches_of(
    path: Path, file: pq.ParquetFile, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """The rows of a file, some at a time, values in place of the indices of a dictionary.

    Args:
        path: of the file.
        file: the same, opened.
        columns: those that are read; None: all.

    Raises:
        DataError: it holds far more than its size.
        OSError, ValueError, pyarrow.ArrowException: it is damaged.
    """
    names = file.schema_arrow.names if columns is None else columns
    room = _LIMIT_BYTES + _LIMIT_FACTOR * path.stat().st_size
    for number in range(file.num_row_groups):
        size = _rows_at_a_time(file.metadata.row_group(number), names)
        for batch in file.iter_batches(size, row_groups=[number], columns=columns):
            batch = _decoded(batch)
            room -= batch.nbytes
            if room < 0:
                raise DataError(
                    f"expected a file that holds at most {_LIMIT_FACTOR} times its size, {path} "
                    f"holds more: write it anew"
                )
            yield batch


def _decoded(batch: pa.RecordBatch) -> pa.RecordBatch:
    columns = [c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in batch]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _rows_at_a_time(group: Any, columns: Sequence[str]) -> int:
    """Rows of a row group that fit into _BATCH_BYTES, at least one.

    Where an encoding other than PLAIN is used, every row may hold all that the column chunk holds.
    """
    expected = 0.0
    for index in range(group.num_columns):
        chunk = group.column(index)
        if chunk.path_in_schema.partition(".")[0] in columns:
            is_plain = {*chunk.encodings} <= {"PLAIN", "RLE", "BIT_PACKED"}
            rows = max(group.num_rows, 1) if is_plain else 1
            expected += chunk.total_uncompressed_size / rows
    return int(min(max(_BATCH_BYTES / max(expected, 1), 1), ROWS_AT_A_TIME))
