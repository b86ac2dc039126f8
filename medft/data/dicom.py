"""DICOM files as rows: tags to choose and join by, and the reports that belong to them.

Rows get only those header tags that a source names.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medft.data.dicom_codecs import check_decoders
from medft.data.dicom_files import HEADER_BYTES, DicomFile, dicom_folder, opened_dicom
from medft.data.dicom_image import import_pydicom
from medft.data.dicom_reports import Join, Reports, takes_tags, text_beside
from medft.data.table_row import ReadOptions, TableCounts
from medft.data.tables import Rejected, TableRow, takes
from medft.data.template import text_of
from medft.errors import DataError

_ALWAYS = "SOPClassUID"
"""A tag that is read from every header: where none is named, pydicom reads all of them."""


def dicom_rows(
    folder: Path,
    *,
    table: Path | None,
    join: Join | None,
    where: dict[str, Any] | None,
    tags: list[str],
    max_pixels: int,
    options: ReadOptions,
    counts: TableCounts,
) -> Iterator[TableRow | Rejected]:
    """A row for each DICOM file below a folder, with its tags and the columns of its report.

    Args:
        folder: searched recursively, in the order of paths.
        table: csv with reports; None: the text of `NAME.txt` beside `NAME.dcm` or `NAME`, as
            column `text`.
        join: {"tag": keyword, "column": name}: which row of the table belongs to a file.
        where: value or list of accepted values by tag or column; other files are skipped.
        tags: keywords to read, such as ViewPosition.
        max_pixels: of an image, which bounds what is read of a file.
        options: encoding of reports, and the texts that count as empty.
        counts: what is counted in the folder, reports and tags.

    Yields:
        Rows with `path` (of the file), tags and columns; a Rejected for a file that cannot be
        read or has no report or several in the table, for a malformed row of it, and for a report
        without a file. Without a table, a missing `NAME.txt` gives an empty text.

    Raises:
        DataError: pydicom or a decoder is not installed, the folder is missing, columns are, or
            the table is malformed as a whole.
    """
    pydicom = import_pydicom()
    found = dicom_folder(folder, with_texts=table is None)
    counts.other_files = dict(sorted(found.other.items()))
    check_decoders((file.syntax for file in found.files if file.problem is None), folder)
    reports = Reports.read(table, join, options, counts) if table else None
    if reports is not None:
        tags = [tag for tag in tags if tag not in reports.columns]
    joined_tag = join["tag"] if join else ""
    wanted = [*tags, *([joined_tag] if join else [])]
    _check_keywords(pydicom, wanted)
    unused = dict.fromkeys(reports.by_key if reports else {})
    for file in found.files:
        try:
            values = _tags_of(file, wanted, max_pixels)
        except Rejected as verdict:
            yield verdict
            continue
        key = values[joined_tag] if join else ""
        key = "" if key in options.na_values else key
        row = options.emptied({tag: values[tag] for tag in tags}, counts)
        if reports is None:
            made = _with_text_beside(row, file, folder.resolve(), where, options, counts)
        else:
            unused.pop(key, None)
            made = reports.of_file(key, row, where, file.path.name)
        if made is not None:
            yield made if isinstance(made, Rejected) else {**made, "path": file.path}
    if reports is not None:
        yield from reports.rejected
    for key in unused:
        yield Rejected("no_image", f"no file with {joined_tag} {key!r}")


def _tags_of(file: DicomFile, tags: list[str], max_pixels: int) -> dict[str, str]:
    """The values of tags in a file's header; other elements are passed over.

    Raises:
        Rejected: it cannot be read.
    """
    import pydicom

    if file.problem is not None:
        raise file.problem
    try:
        with opened_dicom(file.path, max_pixels=max_pixels) as stream:
            header = pydicom.dcmread(
                stream,
                defer_size=HEADER_BYTES,
                stop_before_pixels=True,
                specific_tags=[*tags, _ALWAYS],
            )
            return {tag: _value(header, tag) for tag in tags}
    except Rejected:
        raise
    except Exception as error:  # damaged files make pydicom raise many exceptions
        problem = str(error) or type(error).__name__
        raise Rejected("bad_dicom", f"{file.path.name}: {problem}") from error


def _with_text_beside(
    tags: TableRow,
    file: DicomFile,
    root: Path,
    where: dict[str, Any] | None,
    options: ReadOptions,
    counts: TableCounts,
) -> TableRow | Rejected | None:
    try:
        text = text_beside(file.text, root, options.encoding) if file.text else ""
    except Rejected as verdict:
        return verdict if takes_tags(tags, where) else None
    row = {**tags, **options.emptied({"text": text}, counts)}
    return row if takes(row, where) else None


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
