"""A pass over the images of a source, before they are stored: which values the wide ones have.

Of other images no more than the head is read. An image that cannot be used is passed over here; it
is rejected, with its reason, when its pair is made.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from medft.data.bit_depth import WideImages, wide_values
from medft.data.images import max_bytes_of, opened
from medft.data.row_images import image_in
from medft.data.source_file import open_inside
from medft.data.source_section import SourceSection
from medft.data.sources import source_rows
from medft.data.splits import OwnSplitSection, SplitSection
from medft.data.tables import Rejected, takes
from medft.errors import DataError

HEAD = 32
"""Bytes that tell the bits of a PNG, and other formats that have 8."""

_PNG = b"\x89PNG\r\n\x1a\n"
_NARROW = (b"\xff\xd8\xff", b"BM", b"GIF8", b"RIFF")

NamedImage = tuple[int, str | bytes]
"""Number of a row, and the path or content of an image that it names."""


def is_narrow(head: bytes) -> bool:
    """Whether the head of a file tells that an image has 8 bits a channel, or fewer.

    Args:
        head: the first bytes of a file, HEAD or more.
    """
    if head.startswith(_PNG):
        return head[24:25] != b"\x10"
    return head.startswith(_NARROW)


def named_images(
    source: SourceSection, root: Path, split: SplitSection | OwnSplitSection
) -> Iterator[NamedImage]:
    """The images that the rows of a table name, each path once, and contents of more than 8 bits.

    Args:
        source: its section; not of kind dicom.
        root: folder of SOURCES.yaml.
        split: the section of that name.
    """
    seen: set[int] = set()
    for number, row in enumerate(source_rows(source, root, split), start=1):
        if isinstance(row, Rejected) or not takes(row, source.where):
            continue
        for column in source.image_columns:
            image = image_in(row.get(column))
            if isinstance(image, bytes):
                if not is_narrow(image[:HEAD]):
                    yield number, image
            elif image and (key := hash(image)) not in seen:
                seen.add(key)
                yield number, image


def add_wide_image(found: WideImages, image: str | bytes, folder: str, *, max_pixels: int) -> None:
    """Count an image, unless it is narrow or cannot be used.

    Args:
        found: what is known of the source's images so far.
        image: its path below the folder, or its content.
        folder: the root of the source's images, resolved.
        max_pixels: maximum width times height.
    """
    try:
        content = _wide_content(image, folder, max_pixels) if isinstance(image, str) else image
        if content is not None:
            with opened(content, max_pixels=max_pixels) as decoded:
                if (wide := wide_values(decoded)) is not None:
                    found.add(wide)
    except (OSError, ValueError, DataError, Rejected, MemoryError):
        pass


def _wide_content(name: str, folder: str, max_pixels: int) -> bytes | None:
    with open_inside(
        os.path.join(folder, name), folder, max_bytes=max_bytes_of(max_pixels)
    ) as file:
        head = file.read(HEAD)
        return None if is_narrow(head) else head + file.read()
