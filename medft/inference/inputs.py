"""The images that a user names: files, folders and tables, each image with its prompt."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medft.data.dicom_files import is_dicom
from medft.data.source_file import inside
from medft.data.tables import Rejected, table_rows
from medft.errors import DataError

logger = logging.getLogger(__name__)

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".dcm")
"""Extensions of the files that are taken from a folder, besides those with DICOM's preamble."""

TABLE_ENDINGS = (".csv", ".json", ".jsonl", ".parquet")
"""Extensions of tables: column `image` with paths relative to the table, and `question` if any."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An image and its prompt."""

    image: Path
    prompt: str

    @property
    def name(self) -> str:
        """The path as text, bytes that are not UTF-8 escaped."""
        return writable(str(self.image))


def writable(text: str) -> str:
    """The text of a path, or one that holds it, with bytes that are not UTF-8 escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def entries_of(
    inputs: Sequence[Path], prompt_of: Callable[[Mapping[str, Any]], str]
) -> list[Entry]:
    """The images that files, folders and tables name, each once per prompt.

    Args:
        inputs: in the order of the command line; the files of a folder in the order of names.
        prompt_of: gives the prompt of an image from the columns of its row, if it has one.

    Raises:
        DataError: a path does not exist, a folder holds no image, a table lacks `image`, two names
            are the same as text, or a prompt is no text.
    """
    found: dict[Entry, None] = {}
    for path in inputs:
        if path.is_dir():
            found.update(dict.fromkeys(Entry(p, prompt_of({})) for p in _images_below(path)))
        elif not path.is_file():
            raise DataError(f"expected an image, folder or table at {path}: check the path")
        elif path.suffix.lower() in TABLE_ENDINGS:
            found.update(dict.fromkeys(_entries_of_table(path, prompt_of)))
        else:
            found[Entry(path, prompt_of({}))] = None
    _check_text(found)
    return list(found)


def _images_below(folder: Path) -> list[Path]:
    """The images below a folder; what else lies there is counted in the log.

    Raises:
        DataError: there is none, or a folder cannot be read.
    """
    root = folder.resolve()
    images: list[Path] = []
    skipped: Counter[str] = Counter()
    for path in _paths_below(folder):
        kind = _kind_of(path, root)
        if kind is None:
            images.append(path)
        else:
            skipped[kind] += 1
    counted = ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items()))
    if not images:
        raise DataError(
            f"expected images in the folder {folder}, found none that ends in "
            f"{', '.join(IMAGE_ENDINGS)}, but {counted or 'nothing'}: check the path"
        )
    if skipped:
        logger.warning("skipped in %s: %s", folder, counted)
    return images


def _paths_below(folder: Path) -> list[Path]:
    """The files below a folder, and the links to folders, which are not followed."""

    def fail(error: OSError) -> None:
        raise DataError(
            f"expected a folder that can be read at {error.filename}, it cannot ({error.strerror})"
            f": check its rights"
        ) from error

    found: list[Path] = []
    for place, folders, files in os.walk(folder, onerror=fail):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found += [Path(place, name) for name in [*links, *files]]
    return sorted(found)


def _kind_of(path: Path, root: Path) -> str | None:
    """What a path is, as the log counts it; None for an image."""
    if not path.exists():
        return "dangling links"
    try:
        inside(path, root)
    except Rejected:
        return "links out of the folder"
    if path.is_dir():
        return "links to folders"
    if not path.is_file():
        return "pipes, sockets or devices"
    if path.name.startswith("._"):
        return "files of macOS beside others (._*)"
    is_image = path.suffix.lower() in IMAGE_ENDINGS
    if is_image or (path.name.upper() != "DICOMDIR" and is_dicom(path)):
        return None
    return "other files"


def _entries_of_table(
    table: Path, prompt_of: Callable[[Mapping[str, Any]], str]
) -> Iterator[Entry]:
    for number, row in enumerate(table_rows(table.suffix.lower()[1:], table), start=1):
        if isinstance(row, Rejected):
            raise DataError(f"{table}, row {number}: {row.detail}: correct the table")
        name = row.get("image")
        if not isinstance(name, str) or not name.strip():
            raise DataError(
                f"expected a column image with paths in {table}, row {number} has none (columns "
                f"{', '.join(row)}): rename the column or fill it"
            )
        yield Entry(table.parent / name.strip(), prompt_of(row))


def _check_text(entries: Mapping[Entry, None]) -> None:
    """Check that names and prompts can be written, and told apart where they are read again."""
    seen: dict[tuple[str, str], Path] = {}
    for entry in entries:
        try:
            entry.prompt.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"expected text as the prompt of {entry.name}, it holds half a character: correct "
                f"the table or --prompt"
            ) from error
        other = seen.setdefault((entry.name, entry.prompt), entry.image)
        if other != entry.image:
            raise DataError(
                f"expected names that differ as text, {entry.name} stands for two files: rename one"
            )
