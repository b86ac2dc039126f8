"""Files that somebody else made: inside their folder, regular, and of bounded size.

One rule for every kind of source.
"""

import os
import zlib
from pathlib import Path
from typing import BinaryIO

from medft import foreign
from medft.data.table_row import Rejected
from medft.foreign import UnusableFileError

MAX_BYTES = 2**31
"""Bytes of a file at most, where nothing else bounds it."""

MAX_TEXT_BYTES = 2**24
"""Bytes of a text beside an image at most."""


def inside(path: Path, root: Path) -> Path:
    """The path with its links resolved, which must lie in a folder.

    Args:
        path: of a file, which may be missing.
        root: the folder, resolved.

    Raises:
        Rejected: outside_root.
    """
    resolved = Path(os.path.realpath(path))  # unlike resolve, says nothing about a loop
    if not resolved.is_relative_to(root):
        raise _outside(path)
    return resolved


def open_inside(path: str, root: str, *, max_bytes: int) -> BinaryIO:
    """A regular file, opened to read its bytes, that really lies in a folder.

    Where it lies is looked at once it is open, so that no link can be put in its place meanwhile.

    Args:
        path: of the file.
        root: the folder, resolved.
        max_bytes: its size at most.

    Raises:
        OSError: it is missing, or may not be read.
        Rejected: outside_root, no_regular_file or too_large.
    """
    try:
        file = open_regular(path, max_bytes=max_bytes)
    except FileNotFoundError:
        inside(Path(path), Path(root))
        raise
    try:
        place = os.readlink(f"/proc/self/fd/{file.fileno()}")
    except OSError:  # not of Linux
        place = os.path.realpath(path)
    if not place.startswith(root.rstrip(os.sep) + os.sep):
        file.close()
        raise _outside(path)
    return file


def _outside(path: str | Path) -> Rejected:
    return Rejected("outside_root", f"{os.path.basename(path)} leaves the folder of its source")


def open_regular(path: str | Path, *, max_bytes: int = MAX_BYTES) -> BinaryIO:
    """A regular file, opened to read its bytes.

    Args:
        path: of the file.
        max_bytes: its size at most.

    Raises:
        OSError: it is missing, or may not be read.
        Rejected: no_regular_file for a folder, a pipe or a device; too_large.
    """
    try:
        return foreign.open_regular(path, max_bytes=max_bytes)
    except UnusableFileError as error:
        raise Rejected(error.kind, error.detail) from error


def inflated(content: bytes, *, max_bytes: int) -> bytes:
    """A raw deflate stream, inflated.

    Args:
        content: the stream.
        max_bytes: of the result at most; no more memory is taken.

    Raises:
        Rejected: too_large.
        zlib.error: it is damaged or incomplete.
    """
    inflator = zlib.decompressobj(-zlib.MAX_WBITS)
    result = inflator.decompress(content, max_bytes + 1)
    if len(result) > max_bytes:
        raise Rejected("too_large", f"more than {max_bytes} bytes once inflated")
    if not inflator.eof:
        raise zlib.error("incomplete stream")
    return result
