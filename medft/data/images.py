"""Decodes an image file to one upright image with 8 bits per channel, or raises with the reason.

All images that medft trains on are decoded here: values of more than 8 bits are scaled, not
clipped; transparent pixels are composited over black; the EXIF orientation is applied; a file with
more pixels than allowed is not decoded.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base
from PIL.TiffImagePlugin import BITSPERSAMPLE, PLANAR_CONFIGURATION, SAMPLEFORMAT

from medft.data.bit_depth import GrayScale, eight_bits_alone, wide_values
from medft.data.table_row import Rejected
from medft.errors import DataError

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM")
"""Pillow's names of the accepted formats; files of any other are refused undecoded."""

MAX_SCANS = 100
"""Scans of a progressive JPEG; encoders write about ten."""

_HARMLESS = 5 * 10**10
"""Bytes times pixels: a scan has 10 bytes, and takes a nanosecond a pixel."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its orientation.

Not ImageOps.exif_transpose, which also writes all other tags anew, damaged ones among them.
"""

Image.MAX_IMAGE_PIXELS = None  # `opened` has limits of its own, before anything is decoded

MAX_PIXELS = 64_000_000
"""Maximum pixels of an image, checked before decoding."""


def max_bytes_of(max_pixels: int) -> int:
    """Bytes of an image file at most: 8 a pixel, as uncompressed RGBA of 16 bits, and a header."""
    return 8 * max_pixels + 2**24


def open_image(source: Path | bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image as an upright RGB image with 8 bits per channel.

    Args:
        source: a file, or its content.
        max_pixels: maximum width times height.

    Raises:
        DataError: not an image of an accepted format, damaged, animated, too large, or with more
            than 8 bits of which it does not use 16.
    """
    with opened(source, max_pixels=max_pixels) as image:
        try:
            return eight_bits(image, None).convert("RGB")
        except Rejected as verdict:
            name = _name_of(source)
            raise DataError(f"expected an image of 8 bits, {name}: {verdict.detail}") from verdict


@contextmanager
def opened(source: Path | bytes, *, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """The image as stored in the file; its pixels are decoded at their first use.

    Args:
        source: a file, or its content.
        max_pixels: maximum width times height, checked before decoding.

    Raises:
        DataError: not an image of an accepted format, animated, or too large; also where the
            caller reads its pixels and they are damaged.
    """
    name = _name_of(source)
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(stream, formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise DataError(
                    f"expected an image of at most {max_pixels} pixels, {name} has "
                    f"{width} x {height}: shrink it or raise the limit"
                )
            if getattr(image, "is_animated", False):
                raise DataError(f"expected a single image, {name} has several frames: choose one")
            if image.format == "JPEG" and (scans := _scans(source, width * height)) > MAX_SCANS:
                raise DataError(
                    f"expected a JPEG of at most {MAX_SCANS} scans, {name} has {scans}, each of "
                    f"which takes the time of an image: save it anew"
                )
            yield image
    except FileNotFoundError as error:
        raise DataError(f"expected an image at {name}, there is no file: check the path") from error
    except (DataError, Rejected, MemoryError):
        raise
    except Exception as error:  # damaged files make Pillow raise many exceptions
        # Pillow's message names the object in memory, which differs between runs
        unknown = isinstance(error, UnidentifiedImageError)
        problem = "it is of another format" if unknown else error
        raise DataError(
            f"expected a complete image ({', '.join(FORMATS)}), could not read {name} ({problem}): "
            f"replace the file"
        ) from error


def _scans(source: Path | bytes, pixels: int) -> int:
    """Scans of a JPEG file at most; 0 where it has no room for so many that they take seconds."""
    content = source if isinstance(source, bytes) else source.read_bytes()
    if len(content) * pixels < _HARMLESS:
        return 0
    return content.count(b"\xff\xda")


def _name_of(source: Path | bytes) -> str:
    return f"{len(source)} bytes" if isinstance(source, bytes) else str(source)


def eight_bits(image: Image.Image, scale: GrayScale | None) -> Image.Image:
    """The image upright, of mode L or RGB, transparency composited over black.

    Args:
        image: as Pillow opened it, not decoded yet.
        scale: of the wide images of its source; None if the source is not known.

    Raises:
        Rejected: its values have no known range, or are outside it.
    """
    is_wide_color = _is_wide_color(image)
    wide = wide_values(image)
    if wide is None:
        shown = _opaque(image)
    else:
        shown = eight_bits_alone(wide) if scale is None else scale.eight_bits(wide)
    if is_wide_color and np.asarray(shown).max() < 128:
        raise Rejected(
            "unknown_range",
            "it is of 16 bits per channel and does not use them, so that it would come out dark: "
            "write it with 8 bits per channel",
        )
    turn = _TURNS.get(image.getexif().get(Base.Orientation, 1))
    return shown if turn is None else shown.transpose(turn)


def _opaque(image: Image.Image) -> Image.Image:
    """The image of mode L or RGB, transparency composited over black."""
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, rgba).convert("RGB")
    return image if image.mode == "L" else image.convert("L" if image.mode == "1" else "RGB")


def _is_wide_color(image: Image.Image) -> bool:
    """Whether the file has 16 bits per channel, of which Pillow reads the upper 8.

    Raises:
        Rejected: unknown_range, it is laid out so that Pillow reads it wrongly.
    """
    tags = getattr(image, "tag_v2", {})
    bits, formats = tags.get(BITSPERSAMPLE, ()), tags.get(SAMPLEFORMAT, ())
    is_planar = tags.get(PLANAR_CONFIGURATION) == 2 and max(bits, default=8) > 8
    if len(bits) > 1 and (is_planar or not {*formats} <= {1}):
        raise Rejected("unknown_range", "its color is signed or in planes of 16 bits: write 8 bits")
    tiles = getattr(image, "tile", None) or ()
    return any(";16" in str(tile[3]) for tile in tiles) and not image.mode.startswith("I")
