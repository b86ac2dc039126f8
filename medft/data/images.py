"""Decodes an image file to one upright 8-bit RGB image, or raises with the reason.

All images that medft trains on are decoded here: 16-bit values are scaled, not clipped; transparent
pixels are composited over black; the EXIF orientation is applied; a file with more pixels than
allowed is not decoded.
"""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from medft.errors import DataError

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM")
"""Pillow's names of the accepted formats; files of any other are refused undecoded."""

_ORIENTATION = 0x0112

MAX_PIXELS = 64_000_000
"""Maximum pixels of an image, checked before decoding."""


def open_image(source: Path | bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image as an upright RGB image with 8 bits per channel.

    Args:
        source: a file, or its content.
        max_pixels: maximum width times height.

    Raises:
        DataError: not an image of an accepted format, damaged, animated, or too large.
    """
    with opened(source, max_pixels=max_pixels) as image:
        return to_rgb(ImageOps.exif_transpose(image))


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
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(stream, formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise DataError(
                    f"expected an image of at most {max_pixels} pixels, {name} has "
                    f"{width} x {height}: shrink it or raise the limit"
                )
            frames = getattr(image, "n_frames", 1)
            if frames > 1:
                raise DataError(f"expected a single image, {name} has {frames} frames: choose one")
            yield image
    except FileNotFoundError as error:
        raise DataError(f"expected an image at {name}, there is no file: check the path") from error
    except (
        UnidentifiedImageError,
        Image.DecompressionBombError,
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
    ) as error:
        # Pillow's message names the object in memory, which differs between runs
        unknown = isinstance(error, UnidentifiedImageError)
        problem = "it is of another format" if unknown else error
        raise DataError(
            f"expected a complete image ({', '.join(FORMATS)}), could not read {name} ({problem}): "
            f"replace the file"
        ) from error


def plain_content(content: bytes, image: Image.Image) -> bytes | None:
    """The file without its metadata, if decoding it gives `to_rgb(image)`; else None.

    Args:
        content: of a PNG or JPEG file.
        image: as Pillow opened it, orientation not yet applied.

    Returns:
        None where the image must be re-encoded: other formats, wide or transparent pixels, an
        orientation to apply, a truncated file.
    """
    if image.mode not in ("RGB", "L") or "transparency" in image.info:
        return None
    if image.getexif().get(_ORIENTATION, 1) != 1:
        return None
    if image.format == "PNG":
        return _without_png_metadata(content)
    if image.format == "JPEG":
        return _without_jpeg_metadata(content)
    return None


def _without_png_metadata(content: bytes) -> bytes | None:
    """The PNG signature and the chunks that hold pixels; no text, time or profile.

    Returns:
        None where the end chunk is missing, which Pillow tolerates.
    """
    kept, position = [content[:8]], 8
    while position + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, position)
        chunk = content[position : position + 12 + length]
        if chunk[4:8] in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            kept.append(chunk)
        position += 12 + length
        if chunk[4:8] == b"IEND":
            return b"".join(kept)
    return None


def _without_jpeg_metadata(content: bytes) -> bytes | None:
    """The JPEG without comment and application segments, except JFIF (APP0) and Adobe (APP14)."""
    kept, position = [content[:2]], 2
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == 0xDA:  # the scan follows, to the end of the file
            return b"".join([*kept, content[position:]])
        (length,) = struct.unpack_from(">H", content, position + 2)
        is_metadata = marker == 0xFE or (0xE1 <= marker <= 0xEF and marker != 0xEE)
        if not is_metadata:
            kept.append(content[position : position + 2 + length])
        position += 2 + length
    return None


def to_rgb(image: Image.Image) -> Image.Image:
    """An 8-bit RGB copy: wide gray values scaled to 0..255, transparency composited over black."""
    if image.mode.startswith("I") or image.mode == "F":
        return _scaled_gray(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, rgba).convert("RGB")
    return image.convert("RGB")


def _scaled_gray(image: Image.Image) -> Image.Image:
    """An 8-bit gray image from gray values of 16 or 32 bits.

    Integers are scaled from 0..65535 to 0..255 and larger ones clipped, so that equal values stay
    equal between images. Floating-point images have no fixed range and are scaled by their own
    minimum and maximum.
    """
    values = np.asarray(image, dtype=np.float64)
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())
        values = (values - low) / (high - low or 1.0) * 255
    else:
        values = values / 257
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
