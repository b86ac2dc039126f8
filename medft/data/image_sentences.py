"""What was counted about images, in sentences for the terminal and the page."""

from collections.abc import Mapping
from typing import Any

from medft.data.bit_depth import MOST, PERCENTILES
from medft.data.sentences import (
    SHOWN_NAMES,
    Sentence,
    file_sentences,
    group_sentences,
    identifier_sentences,
)

FEW = 0.05
"""Share of the images below which those that need the most bits deserve a look."""


def all_sentences(summary: Mapping[str, Any]) -> list[Sentence]:
    """What was counted about images, groups, identifiers and files, in sentences.

    Args:
        summary: as in summary.json.
    """
    of_groups = [*group_sentences(summary), *identifier_sentences(summary)]
    return [*image_sentences(summary), *of_groups, *file_sentences(summary)]


def image_sentences(summary: Mapping[str, Any]) -> list[Sentence]:
    """Sentences on images with more than 8 bits a pixel, and on blank ones.

    Args:
        summary: as in summary.json.
    """
    sentences = []
    for name, counts in summary["sources"].items():
        if counts.get("wide_images"):
            sentences += _wide(name, counts)
        if counts["blank_images"]:
            text = f"{name}: {counts['blank_images']:,} images are blank, of one gray value."
            sentences.append(Sentence(text, True, "blank images", counts["blank_images"]))
    return [*_of_sources_together(summary["sources"]), *sentences]


def _of_sources_together(sources: Mapping[str, Any]) -> list[Sentence]:
    """A word on sources of one scanner whose ranges differ."""
    bits = {
        name: counts["bit_depth"]
        for name, counts in sources.items()
        if counts.get("chosen") == "auto" and counts["bit_depth"] is not None
    }
    if len(set(bits.values())) < 2 or max(bits.values()) > MOST:
        return []
    each = ", ".join(f"{name} {depth}" for name, depth in list(bits.items())[:SHOWN_NAMES])
    text = (
        f"Sources differ in their bits a pixel ({each}): where they are of one scanner, equal "
        f"values do not stay equal between them; images.bit_depth: {max(bits.values())} keeps them."
    )
    return [Sentence(text, True)]


def _wide(name: str, counts: Mapping[str, Any]) -> list[Sentence]:
    images, bits = counts["wide_images"], counts["bit_depth"]
    topic = "images with more than 8 bits a pixel"
    begins = f"{name}: {images:,} {topic}"
    if bits == "percentile":
        low, high = PERCENTILES
        text = (
            f"{begins}, each scaled by its own percentiles {low:g} and {high:g}: equal values of "
            f"two of them do not stay equal."
        )
        return [Sentence(text, True, topic, images)]
    by_bits = ", ".join(f"{n:,} of {count} bits" for count, n in counts["images_by_bits"].items())
    ranges = []
    if isinstance(bits, int):
        ranges.append(f"0 to {2**bits - 1:,}")
    elif counts["integer_range"]:
        ranges.append("integers from {:,.0f} to {:,.0f}".format(*counts["integer_range"]))
    if counts["float_range"] and counts["chosen"] == "auto":
        ranges.append("floats from {:g} to {:g}".format(*counts["float_range"]))
    detail = f" ({by_bits} by their largest value)" if by_bits else ""
    sentences = [Sentence(f"{begins}{detail}: {' and '.join(ranges)} became 0 to 255.", False)]
    return [*sentences, *_outliers(name, counts), *_not_finite(name, counts)]


def _outliers(name: str, counts: Mapping[str, Any]) -> list[Sentence]:
    """A word on few images that make all others dark."""
    by_bits = {int(bits): images for bits, images in counts["images_by_bits"].items()}
    if counts["chosen"] != "auto" or len(by_bits) < 2 or counts["bit_depth"] is None:
        return []
    others, most = sorted(by_bits)[-2:]
    is_few = by_bits[most] <= FEW * sum(by_bits.values())
    if most - others < 2 or others > MOST or not is_few:
        return []
    text = (
        f"{name}: {by_bits[most]:,} images need {most} bits where {others} hold all others, which "
        f"come out {2 ** (most - others)} times darker for them: images.bit_depth: {others} "
        f"rejects them."
    )
    return [Sentence(text, True, "images that need more bits than others", by_bits[most])]


def _not_finite(name: str, counts: Mapping[str, Any]) -> list[Sentence]:
    images = counts["non_finite_images"]
    text = f"{name}: {images:,} images hold NaN or infinite values; NaN became black."
    return [Sentence(text, True, "images with NaN or infinite values", images)] if images else []
