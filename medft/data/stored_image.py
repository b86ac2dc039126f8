"""An image as pairs.parquet stores it, with its hashes."""

import hashlib
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from medft.data.bit_depth import GrayScale
from medft.data.images import eight_bits, opened
from medft.data.plain_content import plain_content, profile_of

# Rows 0 to 7 of the cosine transform of 32 samples, unnormalized: only medians are compared.
_COSINES = np.cos(np.pi * np.outer(np.arange(8), 2 * np.arange(32) + 1) / 64)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredImage:
    """An image as pairs.parquet stores it."""

    content: bytes
    """A PNG or JPEG file."""

    name: str | None
    """Name of the original file, without folder; None if there is none."""

    width: int
    """Pixels."""

    height: int
    """Pixels."""

    sha256: str
    """SHA-256 of `content`, in hexadecimal."""

    phash: str
    """64-bit perceptual hash, in hexadecimal."""

    thumbnail: bytes
    """32 x 32 gray values, to compare images whose hashes are near; not in pairs.parquet."""


def store_encoded_image(
    content: bytes,
    *,
    name: str | None,
    scale: GrayScale | None = None,
    max_pixels: int,
    max_side: int | None = None,
) -> StoredImage:
    """An image file as pairs.parquet stores it: as `plain_content` gives it, else as PNG.

    Args:
        content: bytes of the file.
        name: of the file, without folder.
        scale: of images with more than 8 bits a pixel.
        max_pixels: maximum width times height.
        max_side: maximum pixels of the longer side; a larger image is shrunk, antialiased.

    Raises:
        DataError: the image cannot be used.
        Rejected: its values are outside the range of the scale.
    """
    with opened(content, max_pixels=max_pixels) as image:
        is_small = max_side is None or max(image.size) <= max_side
        plain = plain_content(content, image) if is_small else None
        if plain is not None:
            return _stored(plain, image, name)
        return store_image(eight_bits(image, scale), name=name, max_side=max_side)


def store_image(
    image: Image.Image, *, name: str | None, max_side: int | None = None
) -> StoredImage:
    """An image of mode L or RGB as a lossless PNG, shrunk where it is larger than max_side."""
    profile = profile_of(image)
    if max_side and max(image.size) > max_side:
        image = image.copy()
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, format="PNG", compress_level=1, icc_profile=profile)
    return _stored(stream.getvalue(), image, name)


def _stored(content: bytes, image: Image.Image, name: str | None) -> StoredImage:
    width, height = image.size
    small = thumbnail(image)
    return StoredImage(
        content=content,
        name=name,
        width=width,
        height=height,
        sha256=hashlib.sha256(content).hexdigest(),
        phash=perceptual_hash(small),
        thumbnail=small.tobytes(),
    )


def thumbnail(image: Image.Image) -> Image.Image:
    """A 32 x 32 gray thumbnail, smoothed so that copies of other sizes have nearly the same.

    A JPEG that is not decoded yet is decoded at reduced size: the complete file is read, so damage
    is found, but only what the mean of a block needs is computed.
    """
    draft = image.draft("L", (64, 64))
    box = draft[1] if draft else None
    gray = image.convert("L")
    return gray.resize((32, 32), Image.Resampling.HAMMING, box, reducing_gap=3.0)


def perceptual_hash(thumbnail: Image.Image) -> str:
    """A 64-bit perceptual hash, similar for near copies of an image, in hexadecimal.

    Args:
        thumbnail: 32 x 32, gray.

    Each bit says whether one of the 8 x 8 lowest cosine coefficients of the thumbnail exceeds their
    median, from which the constant term is excluded.

    Source: the hash known as pHash; C. Zauner, Implementation and Benchmarking of Perceptual
    Image Hash Functions, 2010, section 3.2.1.
    """
    values = np.frombuffer(thumbnail.tobytes(), np.uint8).reshape(32, 32).astype(float)
    low = (_COSINES @ values @ _COSINES.T).ravel()
    bits = low > np.sort(low[1:])[31]
    return np.packbits(bits).tobytes().hex()
