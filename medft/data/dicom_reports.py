"""The reports of DICOM files: rows of a table by the value that joins them, or files beside."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from medft.data.encoding import LINE_BREAK, decoded
from medft.data.source_file import MAX_TEXT_BYTES, inside, open_regular
from medft.data.table_row import ReadOptions, TableCounts
from medft.data.tables import Rejected, TableRow, table_rows, takes
from medft.data.template import text_of
from medft.errors import DataError

Join = Mapping[Literal["tag", "column"], str]
"""{"tag": keyword, "column": name}: the two whose values must be equal."""


@dataclass(slots=True)
class Reports:
    """The rows of a table of reports."""

    table: Path
    join: Join
    columns: list[str]
    by_key: dict[str, list[TableRow]] = field(default_factory=dict)
    """Rows by their value of the join's column, each different row once."""

    rejected: list[Rejected] = field(default_factory=list)
    """Malformed rows, and rows without that value."""

    within: dict[str, int] = field(default_factory=dict)
    """Values of that column in lines of quoted cells, were they rows of their own, and the line
    on which the row around them ends."""

    @classmethod
    def read(
        cls, table: Path, join: Join | None, options: ReadOptions, counts: TableCounts
    ) -> "Reports":
        """The reports of a CSV file.

        Raises:
            DataError: the file is malformed, has no row or lacks the join's column.
        """
        if join is None:
            raise DataError(f"expected join beside table {table}: write {{tag: ..., column: ...}}")
        column = join["column"]
        found = cls(table, join, [])

        def note_key(row: TableRow) -> bool:
            if len(row) > 1:  # a number alone on a line of a report is no row
                found.within.setdefault(text_of(row.get(column)), counts.lines or 0)
            return False

        seen: set[tuple[Any, ...]] = set()
        options = replace(options, names_image=note_key)
        for row in table_rows("csv", table, options, counts):
            if isinstance(row, Rejected):
                found.rejected.append(row)
                continue
            if column not in row:
                raise DataError(
                    f"expected the column {column} in {table}, it has {', '.join(row)}: "
                    f"correct join"
                )
            found.columns = found.columns or list(row)
            key = text_of(row[column])
            if not key:
                found.rejected.append(
                    Rejected("no_join_value", f"{column} is empty in {table.name}")
                )
            elif (whole := tuple(row.values())) not in seen:
                seen.add(whole)
                found.by_key.setdefault(key, []).append(row)
        if not found.columns:
            raise DataError(f"expected rows in {table}, found none: check the file")
        return found

    def of_file(
        self, key: str, tags: TableRow, where: dict[str, Any] | None, name: str
    ) -> TableRow | Rejected | None:
        """The row of a file, its tags included; None where it does not have what `where` requires.

        Args:
            key: the file's value of the join's tag.
            tags: of the file.
            where: accepted values by tag or column.
            name: of the file, for rejections.

        Returns:
            A Rejected for a file without report, or with several different ones.

        Raises:
            DataError: its report stands within a quoted cell of another row.
        """
        value = f"{self.join['tag']} {key!r}"
        if key in self.by_key:
            rows = [{**report, **tags} for report in self.by_key[key]]
            rows = [row for row in rows if takes(row, where)]
            if len(rows) > 1:
                return Rejected("several_reports", f"{name}: {len(rows)} different rows: {value}")
            return rows[0] if rows else None
        if not takes_tags(tags, where):
            return None
        if key and key in self.within:
            raise DataError(
                f"expected a row of {self.table} to end before the next one, a quoted cell of the "
                f"row that ends on line {self.within[key]} holds that of another DICOM file: close "
                f"the quote before"
            )
        return Rejected("no_report", f"{name}: no row with {value}")


def takes_tags(tags: TableRow, where: dict[str, Any] | None) -> bool:
    """Whether tags have the values that `where` requires of them; its columns do not count."""
    return takes(tags, {tag: value for tag, value in (where or {}).items() if tag in tags})


def text_beside(path: Path, root: Path, encoding: str | None) -> str:
    """The text of a file beside a DICOM file.

    Args:
        path: of the text.
        root: resolved folder of the source.
        encoding: of the text.

    Raises:
        Rejected: it leaves the folder, is no regular file, is too large, cannot be read, or is not
            text in this encoding.
    """
    try:
        with open_regular(inside(path, root), max_bytes=MAX_TEXT_BYTES) as file:
            content = file.read()
        return LINE_BREAK.sub("\n", decoded(content, encoding, path.name))
    except DataError as error:
        raise Rejected("bad_encoding", str(error)) from error
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, in Python 3.11
        reason = getattr(error, "strerror", None) or "a loop of links"
        raise Rejected("unreadable", f"{path.name}: {reason}") from error
