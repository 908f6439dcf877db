"""Sixteen kinds of copies, as people make them of pictures, to measure what finds them."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

Random = np.random.Generator
Picture = Image.Image

QUALITY = 88  # of JPEG, as which every copy is kept in the end


def _again(image: Picture, quality: int) -> Picture:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def window(image: Picture, draw: Random, low: float, high: float) -> Picture:
    """A window anywhere in the picture, of `low` to `high` of its area."""
    side = float(np.sqrt(draw.uniform(low, high)))
    wide, tall = (max(16, round(length * side)) for length in image.size)
    left, top = (
        int(draw.integers(length - part + 1)) for length, part in zip(image.size, (wide, tall), strict=True)
    )
    return image.crop((left, top, left + wide, top + tall))


def _noise(image: Picture, draw: Random) -> Picture:
    values = np.asarray(image, np.float32)
    return Image.fromarray((values + draw.normal(0, 12, values.shape)).clip(0, 255).astype(np.uint8))


def _colour(image: Picture, draw: Random) -> Picture:
    for quality in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = quality(image).enhance(draw.uniform(0.65, 1.35))
    return image


def _text(image: Picture, draw: Random) -> Picture:
    image = image.copy()
    high = image.height // 7
    at = (image.width // 12, int(draw.integers(image.height - high)))
    ImageDraw.Draw(image).text(at, "not for sale", fill=(255, 240, 60), font_size=high)
    return image


def _collage(image: Picture, draw: Random) -> Picture:
    width, height = image.size
    page = Image.new("RGB", (2 * width, height), tuple(int(level) for level in draw.integers(256, size=3)))
    page.paste(image, (0, 0))
    page.paste(ImageOps.posterize(image.transpose(Image.Transpose.ROTATE_180), 3), (width, 0))
    return page


def _screenshot(image: Picture, draw: Random) -> Picture:
    width, height = image.size
    bar = height // 6
    page = Image.new("RGB", (width, height + 2 * bar), (245, 245, 247))
    page.paste(image, (0, bar))
    drawn = ImageDraw.Draw(page)
    drawn.text((width // 20, bar // 4), "12:04   Photos", fill=(20, 20, 20), font_size=bar // 2)
    drawn.rectangle(
        (width // 3, height + bar + bar // 3, 2 * width // 3, height + bar + bar // 2), fill=(60, 60, 60)
    )
    return page


KINDS: dict[str, Callable[[Picture, Random], Picture]] = {
    "JPEG 60 to 90": lambda image, draw: _again(image, int(draw.integers(60, 91))),
    "JPEG 30 to 59": lambda image, draw: _again(image, int(draw.integers(30, 60))),
    "resize": lambda image, draw: ImageOps.scale(image, draw.uniform(0.3, 1.6)),
    "crop 70 to 90%": lambda image, draw: window(image, draw, 0.7, 0.9),
    "crop 50 to 70%": lambda image, draw: window(image, draw, 0.5, 0.7),
    "colour": _colour,
    "blur": lambda image, draw: image.filter(ImageFilter.GaussianBlur(draw.uniform(1, 3))),
    "noise": _noise,
    "flip": lambda image, draw: ImageOps.mirror(image),
    "rotation": lambda image, draw: image.rotate(
        draw.choice([-1, 1]) * draw.uniform(4, 12), Image.Resampling.BICUBIC
    ),
    "text overlay": _text,
    "border": lambda image, draw: ImageOps.expand(
        image, round(min(image.size) * draw.uniform(0.05, 0.12)), (255, 255, 255)
    ),
    "collage": _collage,
    "screenshot-like": _screenshot,
    "aspect": lambda image, draw: image.resize(
        (round(image.width * draw.choice([0.75, 1.33])), image.height)
    ),
    "grey": lambda image, draw: image.convert("L").convert("RGB"),
}


def copies_of(image: Picture, seed: int) -> dict[str, Picture]:
    """A copy of each kind of an RGB picture, by kind; each is drawn by the seed and its kind alone."""
    return {kind: copy_of(image, kind, seed) for kind in KINDS}


def copy_of(image: Picture, kind: str, seed: int) -> Picture:
    """The one of this kind."""
    draw = np.random.default_rng([seed, list(KINDS).index(kind)])
    return _again(KINDS[kind](image, draw), QUALITY)
