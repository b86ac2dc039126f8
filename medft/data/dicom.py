"""DICOM files as rows and images: tags to choose and join by, pixels as a viewer shows them.

Rows get only those header tags that a source names. Images with burned-in annotation are refused
where the header says so. This is not de-identification.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medft.data.dicom_reports import Join, Reports, takes_tags, text_beside
from medft.data.table_row import ReadOptions, TableCounts
from medft.data.tables import Rejected, TableRow, takes
from medft.data.template import text_of
from medft.errors import DataError


def dicom_rows(
    folder: Path,
    *,
    table: Path | None,
    join: Join | None,
    where: dict[str, Any] | None,
    tags: list[str],
    options: ReadOptions,
    counts: TableCounts,
) -> Iterator[TableRow | Rejected]:
    """A row for each .dcm file below a folder, with its tags and the columns of its report.

    Args:
        folder: searched recursively, in the order of paths.
        table: csv with reports; None: the text of `NAME.txt` beside `NAME.dcm`, as column `text`.
        join: {"tag": keyword, "column": name}: which row of the table belongs to a file.
        where: value or list of accepted values by tag or column; other files are skipped.
        tags: keywords to read, such as ViewPosition.
        options: encoding of reports, and the texts that count as empty.
        counts: what is counted in the reports and tags.

    Yields:
        Rows with `path` (of the file), tags and columns; a Rejected for a file that cannot be
        read or has no report or several in the table, for a malformed row of it, and for a report
        without a file. Without a table, a missing `NAME.txt` gives an empty text.

    Raises:
        DataError: pydicom is not installed, the folder is missing, columns are, or the table is
            malformed as a whole.
    """
    pydicom = _pydicom()
    if not folder.is_dir():
        raise DataError(f"expected a folder of .dcm files at {folder}, there is none: check path")
    reports = Reports.read(table, join, options, counts) if table else None
    if reports is not None:
        tags = [tag for tag in tags if tag not in reports.columns]
    joined_tag = join["tag"] if join else ""
    _check_keywords(pydicom, [*tags, *([joined_tag] if join else [])])
    unused = dict.fromkeys(reports.by_key if reports else {})
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".dcm"):
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True)
            row: TableRow = {tag: _value(header, tag) for tag in tags}
            key = _value(header, joined_tag) if join else ""
            key = "" if key in options.na_values else key
        except Exception as error:  # damaged files make pydicom raise many exceptions
            yield Rejected("bad_dicom", f"{path.name}: {error}")
            continue
        row = options.emptied(row, counts)
        if reports is None:
            found = _with_text_beside(row, path, where, options, counts)
        else:
            unused.pop(key, None)
            found = reports.of_file(key, row, where, path.name)
        if found is not None:
            yield found if isinstance(found, Rejected) else {**found, "path": path}
    if reports is not None:
        yield from reports.rejected
    for key in unused:
        yield Rejected("no_image", f"no file with {joined_tag} {key!r}")


def _with_text_beside(
    tags: TableRow,
    path: Path,
    where: dict[str, Any] | None,
    options: ReadOptions,
    counts: TableCounts,
) -> TableRow | Rejected | None:
    try:
        text = text_beside(path, options.encoding)
    except Rejected as verdict:
        return verdict if takes_tags(tags, where) else None
    row = {**tags, **options.emptied({"text": text}, counts)}
    return row if takes(row, where) else None


def open_dicom(path: Path, *, max_pixels: int, every_frame: bool = False) -> list[Image.Image]:
    """The images of a DICOM file as a viewer first shows them, in 8-bit RGB.

    Modality LUT, then VOI LUT or window, then inversion of MONOCHROME1, then 0..255.

    Args:
        path: a .dcm file.
        max_pixels: maximum rows times columns, checked before decoding.
        every_frame: all frames of a multi-frame file instead of the middle one.

    Raises:
        Rejected: burned-in annotation, no pixels, too many, a damaged file, or a missing codec.
    """
    data = None
    try:
        data = _pydicom().dcmread(path)
        if text_of(data.get("BurnedInAnnotation")).upper() == "YES":
            raise Rejected("burned_in_annotation", f"{path.name}: the header says YES")
        if "PixelData" not in data:
            raise Rejected("no_pixels", f"{path.name}: no PixelData")
        if int(data.Rows) * int(data.Columns) > max_pixels:
            raise Rejected("bad_image", f"{path.name}: {data.Columns} x {data.Rows} pixels")
        frames = int(data.get("NumberOfFrames") or 1)
        chosen = range(frames) if every_frame else [frames // 2]
        return [_frame(data, index, frames) for index in chosen]
    except Rejected:
        raise
    except Exception as error:  # damaged files make pydicom raise many exceptions
        raise Rejected("bad_dicom", f"{path.name}: {_problem(error, data)}") from error


def _frame(data: Any, index: int, frames: int) -> Image.Image:
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, pixel_array

    pixels = pixel_array(data, index=index) if frames > 1 else pixel_array(data)
    if data.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, data)
        return _eight_bits(pixels[..., :3], 0, np.iinfo(pixels.dtype).max)
    if pixels.ndim == 3:  # pydicom has converted color to RGB
        return _eight_bits(pixels[..., :3], 0, 2 ** int(data.BitsStored) - 1)
    values = apply_voi_lut(apply_modality_lut(pixels, data), data)
    low, high = _display_range(data, values)
    if data.PhotometricInterpretation == "MONOCHROME1":
        low, high = high, low
    return _eight_bits(values, low, high)


def _eight_bits(values: np.ndarray, low: float, high: float) -> Image.Image:
    scaled = (values.astype(np.float64) - low) / ((high - low) or 1.0) * 255
    return Image.fromarray(np.rint(scaled.clip(0, 255)).astype(np.uint8)).convert("RGB")


def _display_range(data: Any, values: np.ndarray) -> tuple[float, float]:
    """The values shown as black and white: the output range of a LUT or window, else the image's.

    Source: DICOM PS3.3 C.11.2; the range of a window's output as in pydicom's apply_windowing.
    """
    if data.get("VOILUTSequence"):
        return 0, 2 ** int(data.VOILUTSequence[0].LUTDescriptor[2]) - 1
    if data.get("WindowWidth") is None or data.get("WindowCenter") is None:
        return float(values.min()), float(values.max())
    bits, signed = int(data.BitsStored), int(data.PixelRepresentation) == 1
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    slope = float(data.get("RescaleSlope") or 1)
    intercept = float(data.get("RescaleIntercept") or 0)
    return low * slope + intercept, high * slope + intercept


def _problem(error: Exception, data: Any | None) -> str:
    """The error message, with the transfer syntax where a codec may be missing."""
    text = " ".join(str(error).split())[:300]
    syntax = getattr(getattr(data, "file_meta", None), "TransferSyntaxUID", None)
    if syntax is None or not syntax.is_compressed:
        return text
    return (
        f"{syntax.name} could not be decoded; if a codec is missing, install pylibjpeg, "
        f"pylibjpeg-libjpeg and pylibjpeg-openjpeg ({text})"
    )


def _check_keywords(pydicom: Any, tags: list[str]) -> None:
    unknown = [tag for tag in tags if pydicom.datadict.tag_for_keyword(tag) is None]
    if unknown:
        raise DataError(
            f"expected DICOM keywords such as AccessionNumber, {', '.join(unknown)} is none and no "
            f"column of the table: correct the source"
        )


def _value(header: Any, tag: str) -> str:
    value = header.get(tag)
    return text_of("" if value is None else value)


def _pydicom() -> Any:
    """The package, its warnings of invalid values off: they quote the header."""
    try:
        import pydicom
    except ImportError as error:
        raise DataError(
            "expected pydicom for sources of kind dicom, it is not installed: "
            "pip install medft[dicom]"
        ) from error
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    return pydicom
