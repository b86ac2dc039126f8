"""Gray values of more than 8 bits a pixel -> 0..255, by the range that all images of a source have.

Scanners write 10, 12 or 14 bits into files of 16, which do not say how many: scaled from 0..65535,
12 bits come out nearly black. Scaled by its own range, equal values of two images come out
different. So the range is that of the source, which a pass over its images before finds.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT

from medft.data.table_row import Rejected

BitDepth = int | Literal["auto", "percentile"]

LEAST, MOST = 8, 16
"""Bits that may be given; auto goes beyond 16 where a file of 32 bits does."""

PERCENTILES = (0.5, 99.5)
"""Of an image's finite values, black and white under `percentile`.

Source: the clipping of nnU-Net (Isensee et al. 2021, Nature Methods 18, supplementary note 2).
"""

_BLOCK = 2**20
"""Values that are scaled at a time, which bounds the memory of float64."""


@dataclass(frozen=True, slots=True)
class WideValues:
    """The gray values of an image that has more than 8 bits a pixel, or signed ones."""

    values: np.ndarray
    """[H, W], unsigned or signed integers or float32."""

    is_inverted: bool
    """Whether 0 is white: TIFF's WhiteIsZero, which Pillow applies to 8 bits alone."""

    transparent: int | None = None
    """The value of transparent pixels, which become black."""

    @property
    def is_float(self) -> bool:
        """Whether they have a fraction."""
        return self.values.dtype.kind == "f"

    def extent(self) -> tuple[float, float, bool]:
        """Least and largest finite value, and whether all are finite.

        Raises:
            Rejected: bad_image, none is finite.
        """
        values, is_finite = self.values, True
        if self.is_float:
            finite = np.isfinite(values)
            is_finite = bool(finite.all())
            values = values if is_finite else values[finite]
            if not values.size:
                raise Rejected("bad_image", "no value of it is finite")
        return float(values.min()), float(values.max()), is_finite


def wide_values(image: Image.Image) -> WideValues | None:
    """The values of a gray image with more than 8 bits a pixel, or signed; None for any other.

    Args:
        image: as Pillow opened it, not decoded yet.
    """
    tags = getattr(image, "tag_v2", {})
    sample_format = tags.get(SAMPLEFORMAT, (1,))
    if image.mode == "L" and sample_format == (2,):
        return WideValues(np.asarray(image).view(np.int8), False)
    if not (image.mode.startswith("I") or image.mode == "F"):
        return None
    stretched = _largest_of_pgm(image)
    values = np.asarray(image)
    if image.mode == "I" and tags.get(BITSPERSAMPLE) == (32,) and sample_format == (1,):
        values = values.view(np.uint32)
    if stretched is not None:
        values = np.rint(values * (stretched / FULL_RANGE.high)).astype(np.uint16)
    transparent = image.info.get("transparency")
    is_value = isinstance(transparent, int)
    return WideValues(
        values, tags.get(PHOTOMETRIC_INTERPRETATION) == 0, transparent if is_value else None
    )


def _largest_of_pgm(image: Image.Image) -> int | None:
    """The largest value that a PGM says it may have, by which Pillow stretches all others."""
    if image.format != "PPM" or image.mode != "I":
        return None
    arguments = getattr(image, "tile", [])[0].args
    return arguments[1] if isinstance(arguments, tuple) else None


@dataclass(frozen=True, slots=True)
class GrayRange:
    """The values that become black and white."""

    low: float
    high: float

    def scaled(self, wide: WideValues) -> Image.Image:
        """An 8-bit gray image: values beyond the range clipped, NaN and transparent ones black."""
        values = wide.values
        if not wide.is_float and self.low >= 0 and self.high < 2**MOST:
            most = math.ceil(self.high)
            pixels = self._levels(np.arange(most + 1), wide.is_inverted)[values.clip(0, most)]
        else:
            pixels = np.empty(values.shape, np.uint8)
            rows = max(_BLOCK // pixels.shape[1], 1)
            for top in range(0, len(pixels), rows):
                block = slice(top, top + rows)
                pixels[block] = self._levels(values[block], wide.is_inverted)
        if wide.transparent is not None:
            pixels[values == wide.transparent] = 0
        return Image.fromarray(pixels)

    def _levels(self, values: np.ndarray, is_inverted: bool) -> np.ndarray:
        span = (self.high - self.low) or 1.0
        scaled = (values.astype(np.float64) - self.low) * (255 / span)
        scaled = np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0).clip(0, 255)
        levels = np.rint(scaled).astype(np.uint8)
        if is_inverted:
            levels = 255 - levels
            levels[np.isnan(values)] = 0
        return levels


FULL_RANGE = GrayRange(0, 2.0**MOST - 1)


@dataclass(frozen=True, slots=True)
class GrayScale:
    """How the wide values of a source's images become 8 bits."""

    integers: GrayRange | None = None
    floats: GrayRange | None = None
    is_percentile: bool = False
    """Whether every image has a range of its own."""

    def eight_bits(self, wide: WideValues) -> Image.Image:
        """An 8-bit gray image.

        Raises:
            Rejected: outside_bit_depth, a value is outside the range; bad_image, none is finite.
        """
        low, high, _ = wide.extent()
        if self.is_percentile:
            return _own_range(wide, low, high).scaled(wide)
        known = self.floats if wide.is_float else self.integers
        if known is None or low < known.low or high > known.high:
            allowed = "none known" if known is None else f"{known.low:g} to {known.high:g}"
            raise Rejected(
                "outside_bit_depth", f"its values go from {low:g} to {high:g}, allowed: {allowed}"
            )
        return known.scaled(wide)


def eight_bits_alone(wide: WideValues) -> Image.Image:
    """An 8-bit gray image from an image whose source is not known.

    Raises:
        Rejected: unknown_range, other images of its source might have larger values.
    """
    low, high, _ = wide.extent()
    if wide.is_float or low < 0 or not FULL_RANGE.high // 2 < high <= FULL_RANGE.high:
        raise Rejected(
            "unknown_range",
            f"its values go from {low:g} to {high:g}, and which of them is white only the other "
            f"images of its series tell: write all of them with 8 bits, as medft data prepare does",
        )
    return FULL_RANGE.scaled(wide)


def _own_range(wide: WideValues, low: float, high: float) -> GrayRange:
    values = wide.values[np.isfinite(wide.values)] if wide.is_float else wide.values
    below, above = np.percentile(values, PERCENTILES).tolist()
    return GrayRange(below, above) if above > below else GrayRange(low, high)


@dataclass(slots=True)
class WideImages:
    """What is known of the wide images of a source."""

    images_by_bits: Counter[int] = field(default_factory=Counter)
    """Images of unsigned integers by the least number of bits that holds their values."""

    integers: list[float] = field(default_factory=list)
    """Least and largest value of all integers; empty if there are none."""

    floats: list[float] = field(default_factory=list)
    """Least and largest finite value of all floats; empty if there are none."""

    non_finite: int = 0
    """Images with a NaN or an infinity."""

    images: int = 0

    def add(self, wide: WideValues) -> None:
        """Count an image.

        Raises:
            Rejected: none of its values is finite.
        """
        low, high, is_finite = wide.extent()
        self.images += 1
        self.non_finite += not is_finite
        if wide.is_float:
            self.floats = _joined(self.floats, [low, high])
            return
        self.integers = _joined(self.integers, [low, high])
        if low >= 0:
            self.images_by_bits[max(int(high).bit_length(), LEAST)] += 1

    def merge(self, other: "WideImages") -> None:
        """Add what was found in other images."""
        self.images_by_bits += other.images_by_bits
        self.integers = _joined(self.integers, other.integers)
        self.floats = _joined(self.floats, other.floats)
        self.non_finite += other.non_finite
        self.images += other.images

    @property
    def bits(self) -> int | None:
        """The least number of bits that holds all integers; None with a negative one, or none."""
        if not self.integers or self.integers[0] < 0:
            return None
        return max(self.images_by_bits)

    def scale(self, bit_depth: BitDepth) -> GrayScale:
        """How the images become 8 bits.

        auto: unsigned integers from 0 to the largest of that number of bits; signed integers that
        are negative somewhere, and floats, from the least to the largest value of the source.
        """
        if bit_depth == "percentile":
            return GrayScale(is_percentile=True)
        if bit_depth != "auto":
            given = GrayRange(0, 2.0**bit_depth - 1)
            return GrayScale(given, given)
        integers = GrayRange(*self.integers) if self.integers else None
        if self.bits is not None:
            integers = GrayRange(0, 2.0**self.bits - 1)
        return GrayScale(integers, GrayRange(*self.floats) if self.floats else None)

    def summary(self, bit_depth: BitDepth) -> dict[str, Any]:
        """The source's entry in summary.json; empty without wide images."""
        if not self.images:
            return {}
        bits = {str(bits): self.images_by_bits[bits] for bits in sorted(self.images_by_bits)}
        return {
            "chosen": bit_depth,
            "bit_depth": self.bits if bit_depth == "auto" else bit_depth,
            "wide_images": self.images,
            "images_by_bits": bits,
            "integer_range": [int(value) for value in self.integers] or None,
            "float_range": self.floats or None,
            "non_finite_images": self.non_finite,
        }


def _joined(one: Iterable[float], other: Iterable[float]) -> list[float]:
    values = [*one, *other]
    return [min(values), max(values)] if values else []
