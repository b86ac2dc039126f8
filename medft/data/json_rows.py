"""Rows of JSON lists and of JSONL files; what JSON forbids or leaves open is not guessed at.

NaN, which Python and pandas write for a missing number, is an empty cell. Infinity is refused.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medft.data.table_row import Rejected, TableRow
from medft.errors import DataError
from medft.foreign import RepeatedKeyError, object_of


def jsonl_rows(text: str) -> Iterator[TableRow | Rejected]:
    """The objects of the lines; a Rejected for a line that is something else."""
    for number, line in enumerate(io.StringIO(text), start=1):
        if line.strip():
            yield _row(line.strip(), number)


def json_rows(text: str, table: Path) -> Iterator[TableRow]:
    """The objects of a list.

    Args:
        text: of the file.
        table: its path, for errors.

    Raises:
        DataError: the text is no list of objects, or a key stands twice in an object.
    """
    try:
        rows = parsed(text)
    except RepeatedKeyError as error:
        raise DataError(
            f"expected every key once in an object of {table}, {error}: rename or remove one"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"expected json in {table}, could not parse it ({error}): check its kind"
        ) from error
    if not isinstance(rows, list):
        raise DataError(
            f"expected a list of objects in {table}, got {type(rows).__name__}: check its kind"
        )
    for row in rows:
        if not isinstance(row, dict):
            raise DataError(
                f"expected objects in {table}, got {type(row).__name__}: check its kind"
            )
        yield row


def _row(line: str, number: int) -> TableRow | Rejected:
    try:
        row = parsed(line)
    except RepeatedKeyError as error:
        return Rejected("repeated_key", f"line {number}: {error}")
    except json.JSONDecodeError as error:
        return Rejected("bad_json", f"line {number}, column {error.colno}: {error.msg}")
    except (ValueError, RecursionError) as error:
        return Rejected("bad_json", f"line {number}: {error}")
    if not isinstance(row, dict):
        return Rejected("bad_json", f"line {number}: {type(row).__name__} instead of an object")
    return row


def parsed(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, or a key stands twice in an object.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=object_of, parse_constant=_constant)


def _constant(name: str) -> float:
    if name != "NaN":
        raise ValueError(f"{name} is no JSON")
    return float("nan")
