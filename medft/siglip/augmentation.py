"""Small random augmentations of training images."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from medft.config.recipe import SiglipDataSection


def augments(data: SiglipDataSection) -> bool:
    """Whether any random augmentation is on."""
    return bool(
        data.random_rotation or data.random_crop < 1 or data.random_brightness or data.random_flip
    )


def augment(image: Image.Image, data: SiglipDataSection, seed: Sequence[int]) -> Image.Image:
    """The image randomly rotated, cropped, changed in brightness and mirrored.

    Args:
        image: RGB.
        data: the recipe's section; its `random_` keys limit the changes.
        seed: of the random changes; equal seeds give equal images.
    """
    draw = np.random.default_rng(seed)
    angle, kept, left, top, brightness = (
        draw.uniform(-data.random_rotation, data.random_rotation),
        draw.uniform(data.random_crop, 1),
        draw.random(),
        draw.random(),
        1 + draw.uniform(-data.random_brightness, data.random_brightness),
    )
    if angle:
        image = image.rotate(angle, resample=Image.Resampling.BICUBIC)
    width, height = (max(1, round(side * kept)) for side in image.size)
    x, y = round((image.width - width) * left), round((image.height - height) * top)
    image = image.crop((x, y, x + width, y + height))
    if brightness != 1:
        image = ImageEnhance.Brightness(image).enhance(brightness)
    return ImageOps.mirror(image) if data.random_flip and draw.random() < 0.5 else image
