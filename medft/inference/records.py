"""The file that predict writes: its records, and what a later run keeps of them."""

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TextIO

from medft.config.strict_yaml import shortened
from medft.data.csv_rows import LARGEST_CELL
from medft.data.source_file import open_regular
from medft.data.table_row import Rejected
from medft.errors import RunError
from medft.files import check_folder_for_output, replaced_file
from medft.foreign import path_problem

HEAD = ("image", "prompt", "model", "siglip", "weights")

COLUMNS = (*HEAD, "text", "truncated", "nearest", "embedding", "error")
"""Keys of a record of a .jsonl file."""

CSV_COLUMNS = (
    *HEAD,
    "text",
    "truncated",
    "nearest_id",
    "nearest_text",
    "nearest_similarity",
    "error",
)
"""Columns of a .csv file, which has the nearest case only and no embedding."""

_NUMBERS = ("truncated", "nearest_similarity")
"""Columns of a .csv file that hold no text."""

_FORMULA = re.compile("'*[=+\\-@\\t\\r\\n\uff1d\uff0b\uff0d\uff20]")
"""How a cell begins that spreadsheets run; with quotes before it, one that `_harmless` wrote.

Source: OWASP, CSV Injection.
"""

_MAX_BYTES = 2**33
"""Bytes of a file of predictions at most."""


def record_writer(out: Path, file: TextIO) -> Callable[[dict[str, Any]], Any]:
    """A function that writes a row as a JSON record, or as its CSV columns."""
    if out.suffix == ".jsonl":
        return lambda row: file.write(
            json.dumps({name: row[name] for name in COLUMNS}, ensure_ascii=False) + "\n"
        )
    table = csv.DictWriter(file, CSV_COLUMNS, extrasaction="ignore")

    def write(row: dict[str, Any]) -> None:
        nearest = row["nearest"][0] if row.get("nearest") else {}
        of_nearest = {f"nearest_{name}": value for name, value in nearest.items()}
        table.writerow(_harmless(row | of_nearest))

    return write


def check_out(out: Path) -> None:
    """Refuse a file that is no .jsonl or .csv or that cannot be written, before work is done.

    Raises:
        RunError: it is one.
    """
    if out.suffix not in (".jsonl", ".csv"):
        raise RunError(f"expected --out to end in .jsonl or .csv, got {out}: rename it")
    if problem := path_problem(f"{out}.draft."):  # the name that it has while it is written
        raise RunError(f"expected {problem} for --out, got {shortened(str(out))}: choose another")
    check_folder_for_output(out.parent, allow_content=True)
    try:
        existing = next(p for p in (out.parent, *out.absolute().parents) if p.exists())
        with TemporaryFile(dir=existing):  # /proc says that it is writable
            pass
    except OSError as error:
        raise RunError(
            f"expected a folder for --out that can be written, {existing} cannot be "
            f"({error.strerror}): choose another"
        ) from error


def kept_rows(out: Path, weights: str) -> list[dict[str, Any]]:
    """The rows of an earlier run's file that need not be predicted again.

    A truncated last row and rows that failed are dropped.

    Raises:
        RunError: the file is not one of predictions, or of other models.
    """
    if not out.exists():
        return []
    try:
        with open_regular(out, max_bytes=_MAX_BYTES) as file:
            # a kill may have cut the last character
            content = codecs.getincrementaldecoder("utf-8-sig")().decode(file.read())
        rows = _rows_of_lines(content) if out.suffix == ".jsonl" else _rows_of_table(content)
    except (OSError, ValueError, RecursionError, csv.Error, Rejected) as error:
        raise RunError(
            f"expected predictions of medft in {out}, it holds something else: choose another --out"
        ) from error
    if any(row["weights"] != weights for row in rows):
        raise RunError(
            f"expected predictions of the same models in {out}, it holds those of "
            f"{' and '.join(filter(None, (rows[0]['model'], rows[0]['siglip'])))} as they were "
            f"then: choose another --out"
        )
    return [row for row in rows if not row["error"]]


def _rows_of_lines(content: str) -> list[dict[str, Any]]:
    *lines, truncated = content.split("\n")
    rows = [json.loads(line) for line in lines]
    begins = f'{{"{COLUMNS[0]}": "'
    if not all(map(_is_record, rows)) or truncated[: len(begins)] != begins[: len(truncated)]:
        raise ValueError
    return rows


def _is_record(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and tuple(row) == COLUMNS
        and all(isinstance(row[name], str) for name in HEAD)
        and bool(json.dumps(row, ensure_ascii=False).encode())  # raises for half a character
    )


def _rows_of_table(content: str) -> list[dict[str, Any]]:
    heading = ",".join(CSV_COLUMNS)
    if content[: len(heading)] != heading[: len(content)]:
        raise ValueError
    csv.field_size_limit(LARGEST_CELL)
    rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(content, newline="")))
    if any(None in row for row in rows):
        raise ValueError
    if rows and (rows[-1]["error"] is None or not content.endswith("\n")):
        rows.pop()
    if any(None in row.values() for row in rows):
        raise ValueError
    return [_as_predicted(row) for row in rows]


def rewrite(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rewrite the file with its complete rows, or create it with its header."""
    with replaced_file(out) as file:
        if out.suffix == ".csv":
            csv.DictWriter(file, CSV_COLUMNS).writeheader()
            csv.DictWriter(file, CSV_COLUMNS).writerows(map(_harmless, rows))
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _harmless(row: dict[str, Any]) -> dict[str, Any]:
    """The cells of a CSV row, with a quote before those that a spreadsheet would run."""
    return {name: f"'{value}" if _is_formula(name, value) else value for name, value in row.items()}


def _as_predicted(row: dict[str, Any]) -> dict[str, Any]:
    """The cells as they were before `_harmless`."""
    return {
        name: value[1:] if _is_formula(name, value) and value[0] == "'" else value
        for name, value in row.items()
    }


def _is_formula(name: str, value: Any) -> bool:
    return name not in _NUMBERS and isinstance(value, str) and bool(_FORMULA.match(value))
