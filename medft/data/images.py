"""From the bytes of a picture to one upright 8-bit RGB image, or the reason why not.

Every pixel that medft trains on comes through here, whatever the file: sixteen bits are scaled
instead of clipped, hidden colours under a transparent pixel become black, the orientation that a
camera noted is applied, and a file that would unpack to more pixels than allowed is not unpacked.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from medft.errors import DataError

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM")
"""Pillow's names of the formats that are opened; every other is refused unread."""

MAX_PIXELS = 64_000_000
"""Pixels of a picture at the most, checked before decoding."""


def open_image(source: Path | bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture as an upright RGB image with 8 bits a channel.

    Args:
        source: a file, or its content.
        max_pixels: width times height at the most.

    Raises:
        DataError: no picture of a known format, damaged, animated, or too large.
    """
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(stream, formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise DataError(
                    f"expected a picture of at most {max_pixels} pixels, {name} has "
                    f"{width} x {height}: shrink it or raise the limit"
                )
            if getattr(image, "n_frames", 1) > 1:
                raise DataError(
                    f"expected a single picture, {name} has {image.n_frames} frames: choose one"
                )
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError as error:
        raise DataError(
            f"expected a picture at {name}, there is no file: check the path"
        ) from error
    except (
        UnidentifiedImageError,
        Image.DecompressionBombError,
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
    ) as error:
        raise DataError(
            f"expected a whole picture ({', '.join(FORMATS)}), could not read {name} ({error}): "
            f"replace the file"
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An 8-bit RGB copy: wide grey values scaled to 0..255, transparency laid over black."""
    if image.mode.startswith("I") or image.mode == "F":
        return _scaled_grey(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, rgba).convert("RGB")
    return image.convert("RGB")


def _scaled_grey(image: Image.Image) -> Image.Image:
    """Grey values of 16 or 32 bits as 8 bits.

    Integers are scaled by the width of their type, so that equal values stay equal between
    pictures: 0..65535 becomes 0..255. Floating-point pictures have no fixed range and are scaled
    by their own.
    """
    values = np.asarray(image, dtype=np.float64)
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())
        values = (values - low) / (high - low or 1.0) * 255
    else:
        values = values / 257
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8), mode=None)
