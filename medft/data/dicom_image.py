"""The pixels of a DICOM file as a viewer first shows them.

Images with burned-in annotation are refused where the header says so. This is no
de-identification.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medft.data.dicom_codecs import decoded_frame
from medft.data.dicom_files import HEADER_BYTES, opened_dicom
from medft.data.source_file import MAX_BYTES
from medft.data.table_row import Rejected
from medft.data.template import text_of
from medft.errors import DataError

MIDDLE = -1
"""In place of the index of the middle frame, which only the header tells."""

_COLORS = {
    1: ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"),
    3: ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"),
}
"""Photometric interpretations that are shown as meant, by samples per pixel."""


def import_pydicom() -> Any:
    """The package, its warnings and its log off: they quote the header.

    Raises:
        DataError: it is not installed.
    """
    try:
        import pydicom
    except ImportError as error:
        raise DataError(
            "expected pydicom for sources of kind dicom, it is not installed: "
            'pip install "medft[dicom]"'
        ) from error
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    pydicom.config.logger.setLevel("CRITICAL")
    warnings.filterwarnings("ignore", module="pydicom")
    return pydicom


def frame_count(path: Path, *, max_pixels: int) -> int:
    """The number of frames that the header of a DICOM file gives.

    Args:
        path: of the file.
        max_pixels: as for `dicom_images`.

    Raises:
        Rejected: the header cannot be read, or says that there is no image to use; too_large where
            the frames have more than `MAX_BYTES` pixels together, as no file without compression
            can have.
    """
    with _header_of(path, max_pixels) as (_, header):
        frames = _frames_of(header)
        if frames * header.Rows * header.Columns > MAX_BYTES:
            raise Rejected("too_large", f"{path.name}: more than {MAX_BYTES} pixels in {frames}")
        return frames


def dicom_images(
    path: Path, *, max_pixels: int, frames: Sequence[int] = (MIDDLE,)
) -> Iterator[Image.Image]:
    """The images of a DICOM file as a viewer first shows them, one at a time, in 8 bits.

    Modality LUT, then VOI LUT or window, then inversion of MONOCHROME1, then 0..255.

    Args:
        path: of the file.
        max_pixels: maximum rows times columns, checked before decoding.
        frames: their indices in ascending order, or MIDDLE alone.

    Yields:
        Images of mode L for monochrome ones, RGB for color.

    Raises:
        Rejected: burned-in annotation, no pixels, too many, a damaged file, or no decoder.
    """
    with _header_of(path, max_pixels) as (stream, header):
        count = _frames_of(header)
        chosen = [count // 2 if index == MIDDLE else index for index in frames]
        for pixels in _decoded(stream, header, count, chosen):
            yield _shown(pixels, header)


@contextmanager
def _header_of(path: Path, max_pixels: int) -> Iterator[tuple[Any, Any]]:
    """The bytes of a file, at its pixels, and its header, which has an image to use.

    What fails within is the file's damage.
    """
    header = None
    try:
        pydicom = import_pydicom()
        with opened_dicom(path, max_pixels=max_pixels) as stream:
            header = pydicom.dcmread(stream, stop_before_pixels=True, defer_size=HEADER_BYTES)
            if text_of(header.get("BurnedInAnnotation")).upper() == "YES":
                raise Rejected("burned_in_annotation", "the header says YES")
            _check_header(stream, header, max_pixels)
            yield stream, header
    except Rejected as verdict:
        named = path.name in verdict.detail
        detail = verdict.detail if named else f"{path.name}: {verdict.detail}"
        raise Rejected(verdict.reason, detail) from verdict
    except (DataError, MemoryError):
        raise
    except Exception as error:  # damaged files make pydicom raise many exceptions
        raise Rejected("bad_dicom", f"{path.name}: {_problem(error, header)}") from error


def _check_header(stream: Any, header: Any, max_pixels: int) -> None:
    """Raise for a header without an image, or with one whose numbers cannot be.

    Args:
        stream: at the element after the header; afterwards at the value of the pixels.
        header: of the file.
        max_pixels: of an image.
    """
    if stream.read(4) != (b"\x7f\xe0\x00\x10" if _is_big(header) else b"\xe0\x7f\x10\x00"):
        raise Rejected("no_pixels", "no PixelData")
    # VR and length, or length alone, which is even as those are not: not every file does
    # what its syntax says
    vr = stream.read(2)
    stream.seek(6 if vr in (b"OB", b"OW", b"UN") else 2, 1)
    if vr not in (b"OB", b"OW", b"UN") and vr.isalpha() and not header.original_encoding[0]:
        raise Rejected("bad_dicom", f"pixels of VR {vr.decode(errors='replace')}")
    rows, columns = int(header.Rows), int(header.Columns)
    if rows < 1 or columns < 1:
        raise Rejected("bad_dicom", f"{columns} x {rows} pixels")
    if rows * columns > max_pixels:
        raise Rejected("bad_image", f"{columns} x {rows} pixels")
    samples, color = header.SamplesPerPixel, header.PhotometricInterpretation
    if color not in _COLORS.get(samples, ()):
        raise Rejected("bad_dicom", f"{samples} samples per pixel of {color}")


def _is_big(header: Any) -> bool:
    return header.original_encoding == (False, False)


def _frames_of(header: Any) -> int:
    value = header.get("NumberOfFrames")
    frames = 1 if value is None else int(value)
    if frames < 1:
        raise Rejected("bad_dicom", f"{frames} frames")
    return frames


def _decoded(stream: Any, header: Any, count: int, chosen: Sequence[int]) -> Iterator[np.ndarray]:
    """The pixels of frames, each decoded when it is asked for.

    Args:
        stream: at the value of the pixels.
        header: of the file.
        count: of all frames.
        chosen: ascending indices.
    """
    from pydicom.encaps import generate_frames, get_frame

    syntax = header.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        yield from _plain_frames(stream, header, chosen)
        return
    _check_items(stream)
    offsets = None
    if "ExtendedOffsetTable" in header:
        offsets = (header.ExtendedOffsetTable, header.ExtendedOffsetTableLengths)
    if len(chosen) == 1:
        frame = get_frame(stream, chosen[0], number_of_frames=count, extended_offsets=offsets)
        yield decoded_frame(frame, header, syntax)
        return
    wanted, found = set(chosen), 0
    frames = generate_frames(stream, number_of_frames=count, extended_offsets=offsets)
    for index, frame in enumerate(frames):
        if index in wanted:
            found += 1
            yield decoded_frame(frame, header, syntax)
    if found < len(wanted):
        raise Rejected("bad_dicom", f"{found} of {len(wanted)} frames")


def _check_items(stream: Any) -> None:
    """Raise for compressed pixels without an end, as those of a truncated file; PS3.5, A.4."""
    start = stream.tell()
    while (item := stream.read(8))[:4] == b"\xfe\xff\x00\xe0":
        stream.seek(int.from_bytes(item[4:], "little"), 1)
    if item[:4] != b"\xfe\xff\xdd\xe0":
        raise Rejected("bad_dicom", "its compressed pixels have no end")
    stream.seek(start)


def _plain_frames(stream: Any, header: Any, chosen: Sequence[int]) -> Iterator[np.ndarray]:
    """Frames that are not compressed, of a value that is as long as the header says."""
    from pydicom.pixels import as_pixel_options, get_decoder
    from pydicom.pixels.utils import get_expected_length

    start = stream.tell()
    stream.seek(start - (8 if _is_big(header) else 4))
    vr = stream.read(4)[:2] if _is_big(header) else b""
    length = int.from_bytes(stream.read(4), "big" if vr else "little")
    found, expected = min(stream.seek(0, 2) - start, length), get_expected_length(header)
    stream.seek(start)
    has_all_colors = found >= expected * 3 // 2  # though half of them should be left out
    if found < expected or (header.PhotometricInterpretation == "YBR_FULL_422" and has_all_colors):
        raise Rejected("bad_dicom", f"{found} bytes of pixels, the header says {expected}")
    decoder = get_decoder(header.file_meta.TransferSyntaxUID)
    options = as_pixel_options(header, pixel_keyword="PixelData", pixel_vr=vr.decode())
    for index in chosen:
        yield decoder.as_array(stream, index=index, **options)[0]


def _shown(pixels: np.ndarray, header: Any) -> Image.Image:
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut

    if header.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, header)
        high = np.iinfo(pixels.dtype).max
        return _image(pixels[..., :3], lambda some: _eight_bits(some, 0, high))
    if pixels.ndim == 3:  # pydicom has converted color to RGB
        high = 2 ** int(header.BitsStored) - 1
        return _image(pixels[..., :3], lambda some: _eight_bits(some, 0, high))

    def as_shown(some: np.ndarray) -> np.ndarray:
        values = apply_voi_lut(apply_modality_lut(some, header), header)
        low, high = _display_range(header, values)
        if header.PhotometricInterpretation == "MONOCHROME1":
            low, high = high, low
        return _eight_bits(values, low, high)

    return _image(pixels, as_shown)


def _image(pixels: np.ndarray, as_shown: Callable[[np.ndarray], np.ndarray]) -> Image.Image:
    """The pixels as shown, through a table of those values that they have.

    A table costs one byte per pixel where the arithmetic in float64 costs many times eight, and
    gives the same: that is a function of each value, and of the least and largest of them.
    """
    if pixels.dtype.kind not in "iu" or pixels.dtype.itemsize > 2:
        return Image.fromarray(as_shown(pixels))
    codes = pixels.view(pixels.dtype.str.replace("i", "u"))
    is_used = np.zeros(2 ** (8 * pixels.dtype.itemsize), bool)
    for row in codes:
        is_used[row] = True
    table = np.zeros(len(is_used), np.uint8)
    table[is_used] = as_shown(np.flatnonzero(is_used).astype(codes.dtype).view(pixels.dtype))
    shown = np.empty(pixels.shape, np.uint8)
    for row, own in zip(shown, codes, strict=True):
        row[:] = table[own]
    return Image.fromarray(shown)


def _eight_bits(values: np.ndarray, low: float, high: float) -> np.ndarray:
    scaled = (values.astype(np.float64) - low) / ((high - low) or 1.0) * 255
    return np.rint(scaled.clip(0, 255)).astype(np.uint8)


def _display_range(header: Any, values: np.ndarray) -> tuple[float, float]:
    """The values shown as black and white: the output range of a LUT or window, else the image's.

    Source: DICOM PS3.3 C.11.2; the range of a window's output as in pydicom's apply_windowing.
    """
    if header.get("VOILUTSequence"):
        return 0, 2 ** int(header.VOILUTSequence[0].LUTDescriptor[2]) - 1
    if header.get("WindowWidth") is None or header.get("WindowCenter") is None:
        return float(values.min()), float(values.max())
    bits, signed = int(header.BitsStored), int(header.PixelRepresentation) == 1
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    slope = float(header.get("RescaleSlope") or 1)
    intercept = float(header.get("RescaleIntercept") or 0)
    return low * slope + intercept, high * slope + intercept


def _problem(error: Exception, header: Any | None) -> str:
    """The error message, with the transfer syntax, which few decoders name."""
    text = " ".join(str(error).split())[:300] or type(error).__name__
    syntax = getattr(getattr(header, "file_meta", None), "TransferSyntaxUID", None)
    name = getattr(syntax, "name", "")
    return f"{text} ({name})" if name else text
