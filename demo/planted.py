"""Copies and broken files to hide among the originals, whose truth is known."""

import io
import math
import random

import numpy as np
from PIL import Image, ImageEnhance

Edited = tuple[bytes, str, str]  # the file's bytes, its ending, and what was done, in words


def encoded(picture: Image.Image, ending: str, quality: int = 92) -> bytes:
    """A picture as a JPEG, WebP or PNG file."""
    file = io.BytesIO()
    kinds = {"jpg": "JPEG", "webp": "WEBP", "png": "PNG"}
    picture.save(file, kinds[ending], **({} if ending == "png" else {"quality": quality}))
    return file.getvalue()


def exact(data: bytes, ending: str, rng: random.Random) -> Edited:
    """The same bytes under another name, or the same pixels as another file."""
    if rng.random() < 0.7:
        return data, ending, "same bytes"
    return encoded(Image.open(io.BytesIO(data)).convert("RGB"), "png"), "png", "same pixels as PNG"


def reencoded(data: bytes, ending: str, rng: random.Random) -> Edited:
    quality = rng.randint(30, 90)
    return encoded(_opened(data), "jpg", quality), "jpg", f"JPEG {quality}"


def resized(data: bytes, ending: str, rng: random.Random) -> Edited:
    picture, scale = _opened(data), rng.choice((rng.uniform(0.5, 0.9), rng.uniform(1.1, 1.5)))
    size = (round(picture.width * scale), round(picture.height * scale))
    return encoded(picture.resize(size, Image.Resampling.LANCZOS), "jpg"), "jpg", f"{scale:.0%} of the size"


def cropped(data: bytes, ending: str, rng: random.Random) -> Edited:
    picture, share = _opened(data), rng.uniform(0.5, 0.9)
    wide, high = (round(length * math.sqrt(share)) for length in picture.size)
    left, top = rng.randint(0, picture.width - wide), rng.randint(0, picture.height - high)
    return (
        encoded(picture.crop((left, top, left + wide, top + high)), "jpg"),
        "jpg",
        f"{share:.0%} of the area",
    )


def recoloured(data: bytes, ending: str, rng: random.Random) -> Edited:
    """Another saturation (down to grey), brightness and contrast, and a shift of hue."""
    picture, saturation = _opened(data), rng.choice((0.0, rng.uniform(0.3, 0.7), rng.uniform(1.3, 1.8)))
    brightness, contrast, hue = rng.uniform(0.75, 1.3), rng.uniform(0.75, 1.3), rng.randint(-20, 20)
    picture = ImageEnhance.Color(picture).enhance(saturation)
    picture = ImageEnhance.Contrast(ImageEnhance.Brightness(picture).enhance(brightness)).enhance(contrast)
    bands = np.array(picture.convert("HSV"))
    bands[..., 0] += np.uint8(hue % 256)  # the hue is a circle of 256 steps
    words = (
        f"saturation {saturation:.1f}, brightness {brightness:.1f}, "
        f"contrast {contrast:.1f}, hue {hue * 360 / 256:+.0f}°"
    )
    picture = Image.merge("HSV", [Image.fromarray(band) for band in np.moveaxis(bands, 2, 0).copy()])
    return encoded(picture.convert("RGB"), "jpg"), "jpg", words


def corrupt(data: bytes, ending: str, rng: random.Random) -> Edited:
    """What no reader can open: a file cut short, text that calls itself a JPEG, or nothing."""
    share = rng.uniform(0.1, 0.6)
    return rng.choice(
        [
            (data[: int(len(data) * share)], ending, f"cut off after {share:.0%}"),
            (b"<html><title>404 Not Found</title></html>\n", "jpg", "text called .jpg"),
            (b"", "jpg", "empty"),
        ]
    )


def _opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


KINDS = {
    "exact": exact,
    "re-encoded": reencoded,
    "resized": resized,
    "cropped": cropped,
    "recoloured": recoloured,
}
