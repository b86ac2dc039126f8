"""The order of a study's rows."""

import re
from collections.abc import Sequence
from decimal import Decimal

from medft.data.table_row import TableRow
from medft.data.template import text_of

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)


def in_order(
    rows: Sequence[tuple[int, TableRow]], columns: Sequence[str]
) -> list[tuple[int, TableRow]]:
    """The rows of a study by the values of columns, ties as they were.

    Numbers come first, as numbers, so that 2 is before 10; then texts; then empty cells.

    Args:
        rows: with their numbers.
        columns: the first one decides, the next where its values are equal.
    """
    return sorted(rows, key=lambda one: [_key(text_of(one[1].get(name))) for name in columns])


def _key(text: str) -> tuple[int, Decimal, str]:
    if _NUMBER.fullmatch(text):
        return 0, Decimal(text), ""
    return (1 if text else 2), Decimal(0), text
