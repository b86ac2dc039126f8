"""The images of a row: found below their root, decoded, hashed and spooled.

Runs in worker processes, each with its own spool file.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from medft.data.bit_depth import GrayScale
from medft.data.chosen_images import Images
from medft.data.dicom_image import dicom_images
from medft.data.images import max_bytes_of
from medft.data.source_file import open_inside
from medft.data.source_section import SourceSection
from medft.data.sources import ImagesSection
from medft.data.stored_image import StoredImage, store_encoded_image, store_image
from medft.data.tables import Rejected, TableRow
from medft.data.template import text_of
from medft.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class SpooledImage:
    """An image whose bytes stay in a file until its row is written."""

    file: str
    """Name of a spool in the draft folder, or path of the original file if stored unchanged."""

    offset: int
    length: int
    stored: StoredImage
    """The image's properties; its content is empty."""

    modified: int | None = None
    """Modification time of the original file, in ns since the epoch; None for a spool."""


def image_in(cell: Any) -> str | bytes:
    """The path or the content of the image that a cell names; empty if it names none.

    Args:
        cell: text, bytes, or both in the layout of datasets.Image.
    """
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    return cell if isinstance(cell, bytes) else text_of(cell)


class ImageReader:
    """Reads the images of a source's rows; caches what several rows may name."""

    CACHED_IMAGES = 10_000

    def __init__(
        self, source: SourceSection, limits: ImagesSection, root: Path, spool: BinaryIO
    ) -> None:
        """Create the reader.

        Args:
            source: its section.
            limits: of all sources.
            root: folder of SOURCES.yaml.
            spool: the file of this process for images that are not stored as they are.
        """
        self.source, self.limits, self.spool = source, limits, spool
        self.folder = os.path.realpath(source.image_root(root))
        self.scale = GrayScale()
        """Of the source's images with more than 8 bits a pixel, once it is known."""

        self._cache: dict[str, SpooledImage] = {}

    def read(self, row: TableRow, chosen: Images | Rejected) -> list[SpooledImage]:
        """The images of a row.

        Args:
            row: of the source's table.
            chosen: which of them, or why there is none.

        Raises:
            Rejected: one cannot be used.
        """
        if isinstance(chosen, Rejected):
            raise chosen
        try:
            if self.source.kind == "dicom":
                return self._frames(row["path"], chosen)
            columns = [self.source.image_columns[index] for index in chosen]
            return [self._image(row.get(name), name) for name in columns]
        except MemoryError as error:
            detail = "an image takes more memory than one of images.max_pixels may"
            raise Rejected("too_large", detail) from error

    def _frames(self, path: Path, chosen: Images) -> list[SpooledImage]:
        if not chosen:
            return []
        limits = self.limits
        frames = dicom_images(path, max_pixels=limits.max_pixels, frames=chosen)
        return [
            self._spooled(store_image(frame, name=path.name, max_side=limits.max_side))
            for frame in frames
        ]

    def _image(self, value: Any, column: str) -> SpooledImage:
        name = image_in(value)
        if isinstance(name, bytes):
            return self._spooled(self._stored(name, None, column))
        if not name:
            raise Rejected("no_image", f"{column} is empty")
        try:
            path = os.path.join(self.folder, name)
            if path in self._cache:
                return self._cache[path]
            most = max_bytes_of(self.limits.max_pixels)
            with open_inside(path, self.folder, max_bytes=most) as file:
                modified = os.fstat(file.fileno()).st_mtime_ns
                content = file.read()
        except FileNotFoundError as error:
            raise Rejected("missing_image", f"no file {name}") from error
        except (OSError, ValueError) as error:  # a name too long, a null byte, no permission
            reason = getattr(error, "strerror", None) or "not a path"
            raise Rejected("missing_image", f"{name[:200]!r}: {reason}") from error
        if len(self._cache) == self.CACHED_IMAGES:
            self._cache.clear()
        self._cache[path] = self._from_file(path, content, modified, name)
        return self._cache[path]

    def _from_file(self, path: str, content: bytes, modified: int, shown: str) -> SpooledImage:
        stored = self._stored(content, os.path.basename(path), shown)
        if stored.content != content:
            return self._spooled(stored)
        return SpooledImage(
            file=path,
            offset=0,
            length=len(content),
            stored=replace(stored, content=b""),
            modified=modified,
        )

    def _stored(self, content: bytes, name: str | None, shown: str) -> StoredImage:
        limits = self.limits
        try:
            return store_encoded_image(
                content,
                name=name,
                scale=self.scale,
                max_pixels=limits.max_pixels,
                max_side=limits.max_side,
            )
        except DataError as error:
            raise Rejected("bad_image", f"{shown}: {error}") from error
        except Rejected as verdict:
            raise Rejected(verdict.reason, f"{shown}: {verdict.detail}") from verdict

    def _spooled(self, stored: StoredImage) -> SpooledImage:
        offset = self.spool.tell()
        self.spool.write(stored.content)
        self.spool.flush()
        return SpooledImage(
            file=Path(self.spool.name).name,
            offset=offset,
            length=len(stored.content),
            stored=replace(stored, content=b""),
        )
