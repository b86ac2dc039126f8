"""Rows of a CSV file, none of them lost in a quoted cell.

A cell that begins with a quote goes on over line ends until the quote is closed, so that one quote
too many swallows rows. A report of several lines looks the same; what tells them apart is that a
swallowed line is a row when it is read alone.
"""

import csv
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from medft.data.encoding import LINE_BREAK
from medft.data.table_row import Rejected, TableCounts, TableRow
from medft.errors import DataError

DELIMITERS = ",;\t|"
"""The one that gives the header most cells is that of the file."""

LARGEST_CELL = 2**30
"""Characters of a cell at most."""


def csv_rows(
    text: str,
    table: Path,
    names_image: Callable[[TableRow], bool] | None,
    counts: TableCounts,
) -> Iterator[TableRow | Rejected]:
    """The rows below the header; lines and records are counted.

    Args:
        text: of the file.
        table: its path, for errors.
        names_image: whether a row names an image that exists.
        counts: lines and records are added up here.

    Yields:
        A Rejected for a row with too few or too many cells, a quote that nothing may follow, or a
        null character.

    Raises:
        DataError: a column is named twice, a quoted cell is not closed, or one holds a line that
            is a row of its own.
    """
    csv.field_size_limit(LARGEST_CELL)
    lines = _Lines(text)
    reader = _Reader(lines, _delimiter(lines), table)
    counts.lines = counts.records = 0
    header: list[str] = []
    for record in reader.records():
        counts.lines, counts.records = lines.number, counts.records + 1
        header = header if counts.records > 1 else _header(record, table)
        reader.check_no_row_within(record, header, names_image)
        if counts.records > 1:
            yield _row(record, header)
    counts.lines = lines.number


class _Lines(Iterator[str]):
    """The physical lines of a text, and those that the current record has taken."""

    def __init__(self, text: str) -> None:
        self.ahead = io.StringIO(text, newline="")
        self.number = 0
        self.taken: list[str] = []
        self.at_end = False

    def __next__(self) -> str:
        line = self.ahead.readline()
        if not line:
            self.at_end = True
            raise StopIteration
        self.number += 1
        self.taken.append(line)
        return line


@dataclass(frozen=True, slots=True)
class _Record:
    line: int
    """The first of its physical lines."""

    cells: list[str]
    problem: str | None


def _delimiter(lines: _Lines) -> str:
    """The delimiter of the header, or of Excel's line `sep=;`, which is then read."""
    start = lines.ahead.tell()
    line = next((line for line in lines.ahead if line.strip()), "")
    excel = re.fullmatch(r'sep=([^\s"]|\t)\s*', line, re.IGNORECASE)
    lines.ahead.seek(start)
    if excel is not None:
        while lines.taken[-1:] != [line]:
            next(lines)
        return excel[1]
    return max(DELIMITERS, key=lambda sign: len(_alone(line, sign)))


def _alone(line: str, delimiter: str) -> list[str]:
    """The cells of a line that is read without those around it."""
    return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])


class _Reader:
    """Reads records; knows on which line a quoted cell opened."""

    def __init__(self, lines: _Lines, delimiter: str, table: Path) -> None:
        self.lines = lines
        self.delimiter = delimiter
        self.table = table

    def records(self) -> Iterator[_Record]:
        reader = csv.reader(
            self.lines, delimiter=self.delimiter, skipinitialspace=True, strict=True
        )
        while True:
            first = self.lines.number + 1
            self.lines.taken.clear()
            cells: list[str] = []
            problem = None
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                self._check_closed(first)
                problem = str(error)
            if cells or problem:
                yield _Record(first, cells, problem)

    def _check_closed(self, first: int) -> None:
        """Raise where the lines taken are not one, so that where the next row begins is unknown."""
        taken = self.lines.taken
        if self.lines.at_end:
            raise DataError(
                f"expected every quoted cell of {self.table} to be closed, the file ends inside "
                f"the one that opens on line {self._opening(first, taken)}: close its quote, or "
                f"double quotes that are text"
            )
        if len(taken) > 1:
            raise DataError(
                f"expected every quoted cell of {self.table} to be closed, the one that opens on "
                f"line {self._opening(first, taken[:-1])} meets a quote on line "
                f"{self.lines.number} that does not end it: close it before that line, or double "
                f"quotes that are text"
            )

    def _opening(self, first: int, lines: list[str]) -> int:
        """The line on which the cell opened that is open at the end of `lines`."""
        *cells, _ = next(csv.reader(lines, delimiter=self.delimiter, skipinitialspace=True))
        return first + sum(map(_breaks, cells))

    def check_no_row_within(
        self,
        record: _Record,
        header: list[str],
        names_image: Callable[[TableRow], bool] | None,
    ) -> None:
        """Raise for a line of a quoted cell that repeats the header or names an existing image."""
        opening = record.line
        for index, cell in enumerate(record.cells):
            inner = LINE_BREAK.split(cell) if _breaks(cell) else []
            for offset, line in enumerate(inner):
                cells = [value.strip() for value in _alone(line, self.delimiter)]
                # before its first line stand the record's own cells, an image perhaps among them
                columns = header if offset else header[index:]
                row = dict(zip(columns, cells, strict=False))
                repeats = offset > 0 and cells[: len(header)] == header
                if repeats or (names_image is not None and names_image(row)):
                    raise DataError(
                        f"expected a row of {self.table} to end before the next one, the quoted "
                        f"cell that opens on line {opening} holds line {opening + offset}, which "
                        f"looks like a row or header: close the quote before"
                    )
            opening += _breaks(cell)


def _breaks(cell: str) -> int:
    return sum(1 for _ in LINE_BREAK.finditer(cell))


def _header(record: _Record, table: Path) -> list[str]:
    """The column names, those without a name at the end left away."""
    header = [name.strip() for name in record.cells]
    while header and not header[-1]:
        header.pop()
    if record.problem:
        raise DataError(
            f"expected a header on line {record.line} of {table}, could not parse it "
            f"({record.problem}): correct its quotes"
        )
    if any("\0" in name for name in header):
        raise DataError(
            f"expected text in {table}, its header has null characters: give encoding, such as "
            f"utf-16-le, of its source"
        )
    if len(set(header)) < len(header):
        raise DataError(
            f"expected different column names in {table}, got {', '.join(header)}: rename one"
        )
    return header


def _row(record: _Record, header: list[str]) -> TableRow | Rejected:
    cells, line = record.cells, f"line {record.line}"
    if record.problem:
        return Rejected("bad_csv", f"{line}: {record.problem}")
    if any("\0" in cell for cell in cells):
        return Rejected("null_character", f"{line}: a cell holds a null character")
    further = [cell for cell in cells[len(header) :] if cell.strip()]
    if further or len(cells) < len(header):
        return Rejected("wrong_cell_count", f"{line}: {len(cells)} cells for {len(header)} columns")
    return dict(zip(header, cells, strict=False))
