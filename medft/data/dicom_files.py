"""The DICOM files of a folder, known by their first bytes and not by their names.

A medium of a PACS names its files IM000001 and puts viewers, indices and links beside them: what is
no DICOM image is counted by its kind, so that nothing below the folder vanishes.
"""

import io
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from medft.data.source_file import inflated, inside, open_regular
from medft.data.table_row import Rejected
from medft.errors import DataError

_PREAMBLE = 128
_HEAD = 2**14
"""Bytes that hold the file meta, which takes a few hundred."""

_DIRECTORY = "1.2.840.10008.1.3.10"
_DEFLATED = "1.2.840.10008.1.2.1.99"
_APPLE_DOUBLE = b"\x00\x05\x16\x07"

BYTES_PER_PIXEL = 6
"""Of an image at most: three samples of 16 bits."""

HEADER_BYTES = 2**24
"""Of a header at most, beside the pixels; no element of a header that is longer is read."""

_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("bmp", "css", "csv", "dat", "db", "dll", "docx", "exe", "gif", "htm", "html", "inf"),
        *("ini", "jar", "jpeg", "jpg", "js", "json", "log", "md5", "nii", "pdf", "png", "tif"),
        *("tiff", "txt", "xlsx", "xml", "zip"),
    )
)
"""Those that are counted by name; another may be a part of a number or of a patient's name."""

_UNNAMED = ("no suffix", "other suffix", ".dcm")
"""Kinds of names that a DICOM file may have that cannot be read."""


@dataclass(frozen=True, slots=True)
class DicomFile:
    """A DICOM file, or one that should be."""

    path: Path
    syntax: str = ""
    """UID of the transfer syntax; empty where the file meta has none."""

    text: Path | None = None
    """The text file beside it."""

    problem: Rejected | None = None
    """Why it cannot be read."""


@dataclass(frozen=True, slots=True)
class DicomFolder:
    """What lies below a folder."""

    files: list[DicomFile]
    """In the order of their paths."""

    other: Counter[str]
    """Numbers of all other files, by kind."""


def is_dicom(path: Path) -> bool:
    """Whether a file has the preamble of DICOM, whatever its name; False if it cannot be read.

    Raises:
        Rejected: it is a folder, a pipe or a device.
    """
    try:
        with open_regular(path, max_bytes=sys.maxsize) as file:
            return _has_preamble(file.read(_PREAMBLE + 4))
    except (OSError, ValueError):
        return False


def _has_preamble(head: bytes) -> bool:
    return head[_PREAMBLE : _PREAMBLE + 4] == b"DICM"


def dicom_folder(folder: Path, *, with_texts: bool) -> DicomFolder:
    """The DICOM files below a folder; links to folders are not followed.

    A file without preamble is one if it is named .dcm. A DICOMDIR is none.

    Args:
        folder: searched recursively, hidden folders included.
        with_texts: NAME.txt beside NAME.dcm or NAME is its text, and no other file.

    Raises:
        DataError: the folder is missing, or one below it cannot be listed.
    """
    if not folder.is_dir():
        raise DataError(f"expected a folder of DICOM files at {folder}, there is none: check path")
    root = folder.resolve()
    files: list[DicomFile] = []
    other: dict[Path, str] = {}
    for entry in _entries(folder):
        path = Path(entry.path)
        found = _looked_at(entry, path, root)
        if isinstance(found, DicomFile):
            files.append(found)
        else:
            other[path] = found
    if with_texts:
        files = [replace(file, text=_text_of(file.path, other)) for file in files]
    texts = {file.text for file in files}
    kinds = Counter(kind for path, kind in other.items() if path not in texts)
    return DicomFolder(sorted(files, key=lambda file: file.path), kinds)


def _entries(folder: Path) -> Iterator["os.DirEntry[str]"]:
    """All that is no folder; by a list of folders, since a tree may be deeper than the stack."""
    waiting = [str(folder)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                found = list(entries)
        except OSError as error:
            raise DataError(
                f"expected to list every folder below {folder}, one cannot be ({error}): check "
                f"its permissions"
            ) from error
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
            else:
                yield entry


def _looked_at(entry: "os.DirEntry[str]", path: Path, root: Path) -> DicomFile | str:
    """The DICOM file, or the kind of another file."""
    kind = _kind_of(path)
    try:
        if entry.is_symlink():
            if entry.is_dir():
                return "linked folder"
            inside(path, root)
        with open_regular(path) as file:
            head = file.read(_HEAD)
    except Rejected as verdict:
        if verdict.reason == "no_regular_file" and kind != ".dcm":
            return "not regular"
        problem = verdict
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, in Python 3.11
        reason = getattr(error, "strerror", None) or "a loop of links"
        problem = Rejected("unreadable", f"{path.name}: {reason}")
    else:
        if _has_preamble(head):
            meta = _meta_of(head)
            if str(meta.get("MediaStorageSOPClassUID")) == _DIRECTORY:
                return "DICOMDIR"
            return DicomFile(path, str(meta.get("TransferSyntaxUID", "")))
        if path.name.startswith("._") and head.startswith(_APPLE_DOUBLE):
            return "AppleDouble"
        if kind != ".dcm":
            return kind
        problem = Rejected("bad_dicom", f"{path.name}: no DICM after {_PREAMBLE} bytes")
    return DicomFile(path, problem=problem) if kind in _UNNAMED else kind


def _kind_of(path: Path) -> str:
    suffix = path.suffix.lower()
    if not suffix:
        return "no suffix"
    return suffix if suffix in _SUFFIXES or suffix == ".dcm" else "other suffix"


def _text_of(path: Path, other: dict[Path, str]) -> Path | None:
    name = path.name[:-4] if path.suffix.lower() == ".dcm" else path.name
    texts = (path.with_name(name + suffix) for suffix in (".txt", ".TXT"))
    return next((text for text in texts if text in other), None)


def _meta_of(head: bytes) -> Any:
    """The file meta; empty where it is damaged."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.filereader import read_dataset

    stream = io.BytesIO(head)
    stream.seek(_PREAMBLE + 4)
    try:
        meta = read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
        list(meta)  # which converts every value
        return FileMetaDataset(meta)
    except Exception:  # damaged files make pydicom raise many exceptions
        return FileMetaDataset()


class _Bounded:
    """A file that is never asked for more bytes than it has, whatever an element claims.

    It has no name, which pydicom would open once more.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._read = file.read
        self._size = os.fstat(file.fileno()).st_size
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size < _HEAD:
            left = max(0, self._size - self.tell())
            size = left if size < 0 else min(size, left)
        return self._read(size)


@contextmanager
def opened_dicom(path: Path, *, max_pixels: int) -> Iterator[Any]:
    """The bytes of a DICOM file for pydicom, inflated where its transfer syntax is deflated.

    Args:
        path: of the file.
        max_pixels: of an image. A deflated file inflates to `BYTES_PER_PIXEL` times as many bytes
            at most, and `HEADER_BYTES`; twice as many are in memory meanwhile.

    Raises:
        OSError: it is missing, or may not be read.
        Rejected: it is no regular file, or too large.
        zlib.error: it is damaged.
    """
    with open_regular(path) as file:
        head = file.read(_HEAD)
        # parsed where the bytes are there at all, which saves a tenth of a header's time
        meta: Any = _meta_of(head) if _DEFLATED.encode() in head else {}
        if str(meta.get("TransferSyntaxUID")) != _DEFLATED:
            file.seek(0)
            yield _Bounded(file)
            return
        # the group's length, which does not count itself, and not the next element's tag: what
        # follows is compressed and may look like any tag
        file.seek(_PREAMBLE + 4 + 12 + int(meta.FileMetaInformationGroupLength))
        limit = BYTES_PER_PIXEL * max_pixels + HEADER_BYTES
        content = inflated(file.read(), max_bytes=limit)
    from pydicom.filewriter import write_file_meta_info
    from pydicom.uid import ExplicitVRLittleEndian

    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    stream = io.BytesIO(head[: _PREAMBLE + 4])
    stream.seek(_PREAMBLE + 4)
    write_file_meta_info(stream, meta, enforce_standard=False)
    stream.write(content)
    del content
    stream.seek(0)
    yield stream
