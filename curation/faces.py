"""Faces, found by a cascade of OpenCV's (Viola and Jones 2001) and made unrecognisable.

The built-in one is the frontal face cascade that the package opencv-python-headless 4 carries (extra `faces`;
version 5 carries none); others are named by their path. A cascade misses faces that are turned, small or
dark, and sees some where there are none: it lowers the number of faces, and is no promise.
"""

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from curation.classify import check_file
from curation.config import FacesConfig
from dinov2.data.decode import decode
from dinov2.exits import UserError

BUILT_IN = "haarcascade_frontalface_default.xml"
SEEN = 640  # pixels of the long side at which faces are looked for
CELLS = 5  # a face's square is replaced by so many by so many averages, smoothly joined
KEPT = {"JPEG": "JPEG", "MPO": "JPEG", "WEBP": "WEBP"}  # formats that stay; others become PNG, without loss

Box = tuple[int, int, int, int]  # left, top, width, height in pixels of the upright picture


def check(settings: FacesConfig) -> None:
    """Raises UserError if faces could not be looked for."""
    if not settings.blur:
        return
    if settings.detector is not None:
        check_file("filters.faces.detector", Path(settings.detector), settings.sha256)
    _cascade(settings.detector)


def faces_in(image: Image.Image, settings: FacesConfig) -> list[Box]:
    """Boxes of faces, grown by a margin and clipped to the picture, from left to right."""
    scale = min(1.0, SEEN / max(image.size))
    small = image.convert("L").resize(
        [max(1, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR
    )
    least = max(20, round(min(small.size) * settings.smallest))
    found = _cascade(settings.detector).detectMultiScale(
        np.asarray(small), scaleFactor=1.1, minNeighbors=settings.neighbours, minSize=(least, least)
    )
    return sorted(
        _grown(box, 1 / scale, settings.grow, image.size) for box in np.asarray(found).reshape(-1, 4).tolist()
    )


def blurred(data: bytes, boxes: list[Box], kind: str, *, max_pixels: int) -> tuple[bytes, str]:
    """A picture's bytes with these boxes made unrecognisable, encoded again, and their format."""
    image = hidden(decode(data, max_pixels=max_pixels), boxes)
    file, encoding = io.BytesIO(), KEPT.get(kind, "PNG")
    image.save(file, encoding, **({} if encoding == "PNG" else {"quality": 95}))
    return file.getvalue(), encoding


def hidden(image: Image.Image, boxes: list[Box], *, of: tuple[int, int] | None = None) -> Image.Image:
    """A picture with these boxes made unrecognisable; `of`: the size they belong to, if it is another."""
    image = image.copy()
    across, down = (mine / theirs for mine, theirs in zip(image.size, of or image.size, strict=True))
    for left, top, width, height in boxes:
        x, y = int(left * across), int(top * down)
        face = image.crop((x, y, int(np.ceil((left + width) * across)), int(np.ceil((top + height) * down))))
        cells = face.resize((CELLS, CELLS), Image.Resampling.BOX)
        image.paste(cells.resize(face.size, Image.Resampling.BICUBIC), (x, y))
    return image


def _grown(box: list[int], scale: float, by: float, size: tuple[int, int]) -> Box:
    left, top, width, height = (value * scale for value in box)
    x0, x1 = left - by * width, left + (1 + by) * width
    y0, y1 = top - by * height, top + (1 + by) * height
    x0, y0 = max(0, int(x0)), max(0, int(y0))
    return x0, y0, min(size[0], int(np.ceil(x1))) - x0, min(size[1], int(np.ceil(y1))) - y0


@cache
def _cascade(path: str | None) -> Any:
    try:
        import cv2
    except ImportError:
        raise UserError("filters.faces.blur needs OpenCV: pip install 'dinov2-pipeline[faces]'") from None
    if not hasattr(cv2, "CascadeClassifier"):
        raise UserError(
            f"filters.faces.blur: OpenCV {cv2.__version__} has no cascades; install the extra `faces`"
        )
    from cv2.data import haarcascades

    cv2.setNumThreads(1)
    where = path or str(Path(haarcascades) / BUILT_IN)
    if not Path(where).is_file():
        raise UserError(
            f"filters.faces: this OpenCV carries no {BUILT_IN}; name one by filters.faces.detector="
        )
    try:
        found = cv2.CascadeClassifier(where)
    except cv2.error:
        found = None
    if found is None or found.empty():
        raise UserError(f"filters.faces.detector={path} is no cascade that OpenCV reads")
    return found
