"""Compressed frames of DICOM files: which decoder is missing, how large one is, what it decodes to.

A frame says its own size, which decoders trust: it is compared with the header's before any memory
is taken for it.
"""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from medft.data.decoder_process import decode_apart
from medft.data.dicom_files import BYTES_PER_PIXEL, HEADER_BYTES
from medft.data.images import MAX_SCANS
from medft.data.table_row import Rejected
from medft.errors import DataError

_EXTENDED = "1.2.840.10008.1.2.4.51"
_JPEG = tuple(f"1.2.840.10008.1.2.4.{part}" for part in (50, 51, 57, 70, 80, 81))
_JPEG_2000 = tuple(f"1.2.840.10008.1.2.4.{part}" for part in (90, 91, 201, 202, 203))
_RLE = "1.2.840.10008.1.2.5"

_START_OF_FRAME = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
_JP2 = b"\x00\x00\x00\x0cjP  "


def check_decoders(syntaxes: Iterable[str], folder: Path) -> None:
    """Raise for transfer syntaxes that a package decodes which is not installed.

    Args:
        syntaxes: UID of each file's, empty where it has none. One that no package decodes is no
            error: its files are rejected rows.
        folder: of the files.

    Raises:
        DataError: there are some.
    """
    from pydicom.uid import UID

    missing = [
        f"{UID(syntax).name} ({count:,} files)"
        for syntax, count in sorted(Counter(syntaxes).items())
        if not _is_decodable(syntax)
    ]
    if missing:
        raise DataError(
            f"expected decoders for {', '.join(missing)} in {folder}, none is installed: "
            f'pip install "medft[dicom]"'
        )


def _is_decodable(syntax: str) -> bool:
    from pydicom.pixels import get_decoder

    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        return True
    if syntax == _EXTENDED:  # most have 12 bits, which Pillow does not decode
        return not {"gdcm", "pylibjpeg"}.isdisjoint(decoder.available_plugins)
    return bool(decoder.is_available)


def decoded_frame(frame: bytes, header: Any, syntax: str) -> np.ndarray:
    """The pixels of a compressed frame, color as RGB.

    Args:
        frame: the compressed bytes.
        header: Dataset of its file.
        syntax: UID of the transfer syntax.

    Raises:
        Rejected: its size is not that of the header, or its decoder crashed.
        RuntimeError: it cannot be decoded.
    """
    from pydicom.pixels import as_pixel_options

    _check_size(frame, syntax, header.Rows, header.Columns)
    if len(frame) > 2 * header.Rows * header.Columns * BYTES_PER_PIXEL + HEADER_BYTES:
        raise Rejected("too_large", f"a compressed frame of {len(frame)} bytes")
    options = as_pixel_options(header, number_of_frames=1, pixel_keyword="PixelData")
    options.pop("extended_offsets", None)
    pixels: np.ndarray = decode_apart(_decode, frame, str(syntax), options)
    return pixels


def _decode(frame: bytes, syntax: str, options: dict[str, Any]) -> np.ndarray:
    from pydicom.encaps import encapsulate
    from pydicom.pixels import get_decoder
    from pydicom.uid import JPEGBaseline8Bit

    decoder, plugin = get_decoder(syntax), ""
    if syntax == _EXTENDED and options["bits_stored"] > 8 and "gdcm" in decoder.available_plugins:
        # pydicom does not let GDCM decode 12 bits under this UID; the stream says its own process
        decoder, plugin = get_decoder(JPEGBaseline8Bit), "gdcm"
    found = decoder.as_array(encapsulate([frame]), index=0, decoding_plugin=plugin, **options)
    pixels: np.ndarray = found[0]
    return pixels


def _check_size(frame: bytes, syntax: str, rows: int, columns: int) -> None:
    if syntax == _RLE:
        _check_run_lengths(frame, rows * columns)
        return
    if syntax in _JPEG:
        if frame.count(b"\xff\xda") > MAX_SCANS:
            raise Rejected("bad_dicom", f"a frame of more than {MAX_SCANS} scans")
        size = _jpeg_size(frame)
    elif syntax in _JPEG_2000:
        size = _jpeg_2000_size(frame)
    else:
        return
    if size != (rows, columns):
        shown = "no" if size is None else f"{size[1]} x {size[0]}"
        raise Rejected(
            "bad_dicom", f"a frame of {shown} pixels, the header says {columns} x {rows}"
        )


def _jpeg_size(frame: bytes) -> tuple[int, int] | None:
    """Rows and columns of a JPEG or JPEG-LS stream; ISO/IEC 10918-1, B.2.2."""
    position = 2
    while frame[:2] == b"\xff\xd8" and position + 9 <= len(frame) and frame[position] == 0xFF:
        marker = frame[position + 1]
        if marker in _START_OF_FRAME:
            size = frame[position + 5 : position + 9]
            return int.from_bytes(size[:2], "big"), int.from_bytes(size[2:], "big")
        if marker == 0xFF:  # fill
            position += 1
            continue
        length = int.from_bytes(frame[position + 2 : position + 4], "big")
        if length < 2:
            return None
        position += 2 + length
    return None


def _jpeg_2000_size(frame: bytes) -> tuple[int, int] | None:
    """Rows and columns of a JPEG 2000 stream; ISO/IEC 15444-1, A.5.1, its boxes I.4."""
    start = 0
    if frame.startswith(_JP2):
        start = len(_JP2) + 4
        while frame[start + 4 : start + 8] != b"jp2c":
            length = int.from_bytes(frame[start : start + 4], "big")
            if length < 8 or start + length >= len(frame):
                return None  # pydicom would read a box of no length forever
            start += length
        start += 8
    if frame[start : start + 4] != b"\xff\x4f\xff\x51" or len(frame) < start + 24:
        return None
    right, bottom, left, top = (
        int.from_bytes(frame[start + at : start + at + 4], "big") for at in (8, 12, 16, 20)
    )
    return bottom - top, right - left


def _check_run_lengths(frame: bytes, pixels: int) -> None:
    """Raise for a frame whose segments give more bytes than they should; PS3.5, annex G.

    A segment has one byte of each pixel, and should have at most two for each of them.
    """
    count = int.from_bytes(frame[:4], "little")
    words = range(4, 4 + 4 * min(count, 15), 4)
    starts = [int.from_bytes(frame[at : at + 4], "little") for at in words] + [len(frame)]
    for start, end in pairwise(starts):
        segment = frame[start:end]
        given = position = 0
        is_small = len(segment) <= 2 * pixels + 2
        while is_small and position < len(segment):
            code = segment[position]
            given += code + 1 if code < 128 else 257 - code if code > 128 else 0
            position += code + 2 if code < 128 else 2 if code > 128 else 1
            is_small = given <= 2 * pixels + 128
        if not is_small:
            raise Rejected("too_large", f"a run-length segment of more than {pixels} pixels")
