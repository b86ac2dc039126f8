"""Bytes of text files -> text, or the line and the byte at which they are something else."""

import codecs
import re
from pathlib import Path
from typing import BinaryIO

from medft.data.source_file import MAX_BYTES, open_regular
from medft.data.table_row import Rejected
from medft.errors import DataError

LINE_BREAK = re.compile(r"\r\n|\r|\n")
"""The line ends of text files; others, such as U+2028, are characters of a cell."""

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins with the mark of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def check_encoding(name: str) -> None:
    """Raise for a name that is no text codec of Python.

    Raises:
        ValueError: with what was expected.
    """
    try:
        " ".encode(name, "replace")
    except (LookupError, ValueError) as error:  # unknown, or bytes to bytes as base64
        raise ValueError("a codec of Python such as utf-8, cp1252 or utf-16") from error


def read_text(path: Path, encoding: str | None) -> str:
    """Text of a file, without BOM.

    Raises:
        DataError: it cannot be read, or is not text in this encoding.
    """
    with opened_table(path) as file:
        content = file.read()
    return decoded(content, encoding, str(path))


def opened_table(path: Path, *, max_bytes: int = MAX_BYTES) -> BinaryIO:
    """The file of a table, opened to read its bytes.

    Args:
        path: of the file.
        max_bytes: its size at most.

    Raises:
        DataError: it is missing, no regular file or too large.
    """
    try:
        return open_regular(path, max_bytes=max_bytes)
    except (OSError, ValueError, Rejected) as error:
        detail = error.detail if isinstance(error, Rejected) else str(error)
        reason = getattr(error, "strerror", None) or detail
        raise DataError(
            f"expected a table at {path}, could not read it ({reason}): check the path"
        ) from error


def decoded(content: bytes, encoding: str | None, name: str) -> str:
    """Text of the content of a file, without BOM.

    Args:
        content: the bytes.
        encoding: a codec of Python; None: UTF-8.
        name: of the file, for errors.

    Raises:
        DataError: with the line and the byte of it, both counted from 1, that do not decode.
    """
    codec = encoding or "utf-8"
    looks = next((codec for mark, codec in _MARKS if content.startswith(mark)), None)
    if encoding is None and looks is not None:
        raise DataError(
            f"expected UTF-8 in {name}, it begins like {looks.upper()}: give encoding: {looks} "
            f"of its source, or save it as UTF-8"
        )
    try:
        return content.decode(codec).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line, byte = _position(content, error, codec)
        do = "correct encoding" if encoding else "give encoding, such as cp1252, of its source"
        raise DataError(
            f"expected {codec.upper()} in {name}, line {line}, byte {byte} of the line "
            f"({error.object[error.start]:#04x}) is something else: {do}, or save it as UTF-8"
        ) from error
    except UnicodeError as error:  # utf-16 of Python where the BOM is missing and wanted
        raise DataError(
            f"expected {codec.upper()} in {name}, could not decode it ({error}): correct encoding"
        ) from error


def _position(content: bytes, error: UnicodeDecodeError, codec: str) -> tuple[int, int]:
    """Line of a file and byte of that line, from 1, at which decoding stopped."""
    before = error.object[: error.start].decode(codec, "replace")
    *lines, current = LINE_BREAK.split(before)
    mark = len("".encode(codec))
    if lines:
        return len(lines) + 1, len(current.encode(codec, "replace")) - mark + 1
    return 1, len(content) - len(error.object) + error.start + 1  # some codecs cut the BOM off
