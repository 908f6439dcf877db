"""Pictures small enough to stand inside a page."""

import base64
import io
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

Picture = Image.Image | bytes


class Thumbnail(NamedTuple):
    """A picture as a data URI with its size in pixels; an empty URI stands for one that cannot be read."""

    uri: str
    width: int
    height: int


def thumbnail(picture: Picture, side: int) -> Thumbnail:
    """Shrink a picture, or the bytes of a picture file, to at most `side` pixels and encode it as JPEG."""
    try:
        image = _opened(picture, side)
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ):  # what Pillow raises for broken files
        return Thumbnail("", side, side)
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=82, optimize=True)
    return Thumbnail(data_uri(file.getvalue(), "image/jpeg"), image.width, image.height)


def data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _opened(picture: Picture, side: int) -> Image.Image:
    """An upright RGB image of its own, over white where it is transparent."""
    if isinstance(picture, Image.Image):
        image = picture
    else:
        image = Image.open(io.BytesIO(picture))
        image.draft("RGB", (2 * side, 2 * side))
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 bit or float: Pillow's conversion would clip instead of scale
        values = np.asarray(image, dtype=np.float32)
        values = (values - values.min()) * (255.0 / (np.ptp(values) or 1.0))
        image = Image.fromarray(values.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB").copy()
