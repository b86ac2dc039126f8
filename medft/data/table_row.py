"""A row of a source's table, why one is rejected, and what happens to its cells on the way out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TableRow = dict[str, Any]


class Rejected(Exception):
    """A rejected row: a reason code and what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(slots=True)
class TableCounts:
    """What was counted while a table was read."""

    lines: int | None = None
    """Physical lines of a CSV file read so far; None for other formats."""

    records: int | None = None
    """Records among them: the header, rows and rejected rows, not blank lines."""

    na_cells: int = 0
    """Cells that na_values emptied and that had held something."""

    other_files: dict[str, int] | None = None
    """Numbers of files below a folder of DICOM files that are none, by kind; None elsewhere."""

    images_left_out: int | None = None
    """Images of studies that max_images left out; None without it."""

    def add(self, other: "TableCounts") -> None:
        """Add the counts of another table."""
        self.na_cells += other.na_cells
        if other.lines is not None and other.records is not None:
            self.lines = (self.lines or 0) + other.lines
            self.records = (self.records or 0) + other.records

    def summary(self) -> dict[str, Any]:
        """The counts by name, those alone that the kind of source has."""
        counts = {
            "na_cells": self.na_cells,
            "lines": self.lines,
            "records": self.records,
            "other_files": self.other_files,
            "images_left_out": self.images_left_out,
        }
        return {name: count for name, count in counts.items() if count is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """How a table is read, in the words of its source."""

    encoding: str | None = None
    """Codec of a text file; None: UTF-8, with or without BOM."""

    na_values: frozenset[str] = frozenset()
    """Stripped texts of cells that count as empty."""

    names_image: Callable[[TableRow], bool] | None = None
    """Whether a row names an image that exists, which a line within a CSV cell should not."""

    def emptied(self, row: TableRow, counts: TableCounts) -> TableRow:
        """The row, "" in place of each text that is one of na_values; other types stay."""
        if not self.na_values:
            return row
        cells = dict(row)
        for column, value in row.items():
            if isinstance(value, str) and value.strip() in self.na_values:
                counts.na_cells += bool(value.strip())
                cells[column] = ""
        return cells


AS_WRITTEN = ReadOptions()
"""UTF-8, every cell as it is."""
