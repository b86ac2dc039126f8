"""Synthetic images with reports that describe them; no patient, no data set.

Four modalities of four hospitals, each with three findings that differ in brightness, color or
grain. What a report says is visible: a finding or none, how many, how large, and where. Left and
right are those of the image.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

SIDE = 112
"""Side of an image in pixels."""

SIZES = {"small": 0.07, "large": 0.11}
"""Radius of a finding as a fraction of the image's side."""

NUMBERS = {1: "one", 2: "two", 3: "three"}

_LEVELS = {"upper": 0.29, "lower": 0.71}
_SIDES = {"left": 0.29, "right": 0.71}


@dataclass(frozen=True, slots=True)
class Look:
    """The appearance of a finding."""

    noun: str
    plural: str
    color: tuple[int, int, int]
    grain: float
    """Peak-to-peak contrast of the stripes over the color, in gray levels."""

    word: str
    """Its name in captions without medical terms."""


@dataclass(frozen=True, slots=True)
class Modality:
    """The findings of a modality and the wording of its reports."""

    looks: tuple[Look, ...]
    found: tuple[str, ...]
    """Templates of reports with a finding, the first one the most frequent."""

    clear: tuple[str, ...]
    """Reports without a finding."""


MODALITIES = {
    "knee": Modality(
        (
            Look("osteophyte", "osteophytes", (250, 250, 250), 0, "white"),
            Look("cyst", "cysts", (12, 12, 12), 0, "black"),
            Look("erosion", "erosions", (130, 130, 130), 110, "striped"),
        ),
        (
            "Knee radiograph: {phrase} in the {level} {side} part of the joint.",
            "{Phrase}, {side} side of the knee, {level} half.",
        ),
        ("Normal knee radiograph. No cyst or erosion.", "The knee shows no erosion."),
    ),
    "skin": Modality(
        (
            Look("nevus", "nevi", (70, 40, 25), 0, "brown"),
            Look("hemangioma", "hemangiomas", (205, 30, 40), 0, "red"),
            Look("keratosis", "keratoses", (190, 190, 120), 110, "yellow striped"),
        ),
        (
            "{Phrase} on the {level} {side} of the field.",
            "Skin photograph with {phrase}, {side} side, {level} half.",
        ),
        ("Clear skin without nevus or keratosis.", "No hemangioma is seen. Normal skin."),
    ),
    "chest": Modality(
        (
            Look("nodule", "nodules", (245, 245, 245), 0, "white"),
            Look("cavity", "cavities", (8, 8, 8), 0, "black"),
            Look("infiltrate", "infiltrates", (150, 150, 150), 110, "striped"),
        ),
        (
            "There {is} {phrase} in the {side} {level} lung zone.",
            "Chest film: {phrase}, {level} zone of the {side} lung.",
        ),
        ("Both lungs are clear. No nodule.", "No infiltrate or cavity. Normal chest film."),
    ),
    "ct": Modality(
        (
            Look("calcification", "calcifications", (255, 255, 255), 0, "white"),
            Look("cyst", "cysts", (15, 15, 15), 0, "black"),
            Look("hemorrhage", "hemorrhages", (140, 140, 140), 110, "striped"),
        ),
        (
            "Axial slice. {Phrase} in the {level} {side} quadrant.",
            "CT shows {phrase} in the {side} {level} quadrant.",
        ),
        ("Axial slice without hemorrhage or cyst.", "No calcification. Normal CT slice."),
    ),
}


@dataclass(frozen=True, slots=True)
class Phantom:
    """The content of an image."""

    modality: str
    look: Look | None
    """None for an image without finding."""

    count: int
    size: str
    level: str
    side: str


def draw_phantom(modality: str, random: np.random.Generator, *, clear: float = 0.25) -> Phantom:
    """Random content of an image of a modality, without finding with probability `clear`."""
    looks = MODALITIES[modality].looks
    return Phantom(
        modality,
        looks[random.integers(len(looks))] if random.random() >= clear else None,
        int(random.integers(1, 4)),
        *(_one_of(random, names) for names in (SIZES, _LEVELS, _SIDES)),
    )


def report(phantom: Phantom, random: np.random.Generator) -> str:
    """The report of a phantom in the wording of its modality: a sentence or two."""
    modality = MODALITIES[phantom.modality]
    wordings = modality.found if phantom.look else modality.clear
    wording = wordings[0] if random.random() < 0.8 else wordings[1]
    if phantom.look is None:
        return wording
    noun = phantom.look.noun if phantom.count == 1 else phantom.look.plural
    phrase = f"{NUMBERS[phantom.count]} {phantom.size} {noun}"
    return wording.format(
        phrase=phrase,
        Phrase=phrase.capitalize(),
        level=phantom.level,
        side=phantom.side,
        **{"is": "is" if phantom.count == 1 else "are"},
    )


def caption(phantom: Phantom) -> str:
    """The caption of a phantom without medical terms, always in the same order."""
    if phantom.look is None:
        return "no discs."
    discs = "disc" if phantom.count == 1 else "discs"
    return (
        f"{NUMBERS[phantom.count]} {phantom.size} {phantom.look.word} {discs}, {phantom.level} "
        f"{phantom.side}."
    )


def render(
    phantom: Phantom, random: np.random.Generator, *, side: int = SIDE, lateral: bool = False
) -> np.ndarray:
    """The image of a phantom, [side, side, 3] values from 0 to 255.

    Args:
        phantom: what to show.
        random: generator of the background, the noise and the exact positions.
        side: pixels.
        lateral: view from the side: findings are in the middle, only their level is visible.
    """
    rows, columns = np.mgrid[0:side, 0:side] / side
    pixels = _BACKGROUNDS[phantom.modality](rows, columns, random)
    tilt = random.normal(0, 14, 2)
    pixels += ((rows - 0.5) * tilt[0] + (columns - 0.5) * tilt[1])[..., None]
    if phantom.look is not None:
        across = 0.5 if lateral else _SIDES[phantom.side]
        for row, column in _places(phantom, random, across):
            distance = np.hypot(rows - row, columns - column)
            inside = _soft(SIZES[phantom.size] - distance)[..., None]
            stripes = np.sign(np.sin((rows + columns) * 50)) * phantom.look.grain / 2
            color = np.array(phantom.look.color, dtype=float) + stripes[..., None]
            pixels = pixels * (1 - inside) + color * inside
    noise = random.normal(0, 5 * side / SIDE, (side, side, 1))
    return (pixels + noise).clip(0, 255)


def image_of(pixels: np.ndarray, *, gray: bool) -> Image.Image:
    """Pixels from `render` as an 8-bit image."""
    values = np.rint(pixels).astype(np.uint8)
    return Image.fromarray(values[..., 0] if gray else values)


def _places(
    phantom: Phantom, random: np.random.Generator, across: float
) -> list[tuple[float, float]]:
    """Centers of the findings, side by side or in a triangle around the middle of a quadrant."""
    row = _LEVELS[phantom.level] + random.normal(0, 0.015)
    column = across + random.normal(0, 0.015)
    turn, apart = random.uniform(0, 2 * np.pi), 1.25 * SIZES[phantom.size]
    if phantom.count == 1:
        return [(row, column)]
    angles = turn + 2 * np.pi * np.arange(phantom.count) / phantom.count
    return [(row + apart * np.sin(angle), column + apart * np.cos(angle)) for angle in angles]


def _soft(distance: np.ndarray) -> np.ndarray:
    """1 inside, 0 outside, and a soft edge of about two pixels."""
    return 1 / (1 + np.exp(-np.clip(distance * 150, -30, 30)))


def _knee(rows: np.ndarray, columns: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Two long bones with a joint space between them, in soft tissue."""
    gap, width = random.normal(0.5, 0.015), random.normal(0.3, 0.02)
    half = width + 0.13 * np.exp(-(((rows - gap) / 0.16) ** 2))
    bone = _soft(half - np.abs(columns - 0.5)) * _soft(np.abs(rows - gap) - 0.022)
    flesh = _soft(0.47 - np.abs(columns - 0.5))
    return _gray(28 + 40 * flesh + random.normal(88, 8) * bone)


def _skin(rows: np.ndarray, columns: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Even skin of a random tone with a few faint hairs."""
    tone = np.array([224, 172, 140]) * random.uniform(0.78, 1.08)
    pixels = np.broadcast_to(tone, (*rows.shape, 3)).copy()
    for _ in range(random.integers(2, 7)):
        place, slope, bend = random.uniform(0, 1), random.normal(0, 0.6), random.normal(0, 0.4)
        middle = place + slope * (rows - 0.5) + bend * (rows - 0.5) ** 2
        pixels -= 45 * _soft(0.004 - np.abs(columns - middle))[..., None]
    return pixels


def _chest(rows: np.ndarray, columns: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Two dark lungs with ribs, a spine and a heart."""
    shade = np.full(rows.shape, random.normal(172, 9))
    for middle in (0.27, 0.73):
        lung = _soft(0.1 - 0.1 * np.hypot((columns - middle) / 0.2, (rows - 0.5) / 0.42))
        shade -= random.normal(92, 5) * lung
    ribs = np.sin(rows * random.normal(44, 1.5) + 3 * np.abs(columns - 0.5))
    heart = np.hypot((columns - 0.53) / 0.12, (rows - 0.62) / 0.16)
    return _gray(shade + 7 * ribs + 35 * _soft(0.1 - 0.1 * heart))


def _ct(rows: np.ndarray, columns: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A bright outline around soft tissue on black, a vertebra at its foot."""
    wide, high = random.normal(0.475, 0.01), random.normal(0.45, 0.01)
    radius = np.hypot((columns - 0.5) / wide, (rows - 0.5) / high)
    shade = random.normal(118, 9) * _soft(0.2 * (1 - radius))
    shade += 55 * _soft(0.015 - 0.2 * np.abs(radius - 0.93))
    spine = np.hypot(columns - 0.5, rows - 0.84) - random.normal(0.05, 0.006)
    return _gray(shade + 90 * _soft(-spine))


def _gray(shade: np.ndarray) -> np.ndarray:
    return np.repeat(shade[..., None], 3, axis=2)


_BACKGROUNDS = {"knee": _knee, "skin": _skin, "chest": _chest, "ct": _ct}


def _one_of(random: np.random.Generator, names: dict[str, float]) -> str:
    return list(names)[random.integers(len(names))]
