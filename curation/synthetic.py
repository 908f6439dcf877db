"""Synthetic copies of the pool's own pictures: what a crop or another light does to a descriptor."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from curation.descriptor import describe
from curation.looks import THUMB

COPIES = 4  # of each picture


def changes(
    thumbs: NDArray[np.uint8], raw: NDArray[np.float32], generator: np.random.Generator
) -> NDArray[np.float32]:
    """[n * COPIES, raw] how the raw descriptors of copies differ from those of [n, 64, 64, 3] thumbnails."""
    found = [
        describe(copy_of(thumb, generator)) - mine
        for thumb, mine in zip(thumbs, raw, strict=True)
        for _ in range(COPIES)
    ]
    return np.stack(found)


def copy_of(thumb: NDArray[np.uint8], generator: np.random.Generator) -> NDArray[np.uint8]:
    """A thumbnail cropped to 70 to 95% of its side, in another light, or both."""
    image = Image.fromarray(thumb)
    cropped, lit = ((True, False), (True, True), (False, True))[generator.integers(3)]
    if cropped:
        side, stretch = generator.uniform(0.7, 0.95), np.exp(generator.uniform(-0.08, 0.08))
        wide, high = (THUMB * min(1.0, side * by) for by in (stretch, 1 / stretch))
        left, top = generator.uniform(0, THUMB - wide), generator.uniform(0, THUMB - high)
        box = (left, top, left + wide, top + high)
        image = image.resize((THUMB, THUMB), Image.Resampling.BILINEAR, box=box)
    if lit:
        for quality in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = quality(image).enhance(generator.uniform(0.7, 1.3))
    return np.asarray(image)
