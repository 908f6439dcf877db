"""From a file's bytes to an RGB picture, whatever Pillow can open.

What it does with odd pictures:
- Orientation: turned upright as EXIF says. Animations and multi-page files: the first frame.
- Transparency: laid over white. Palettes, CMYK, YCbCr, LAB, HSV: as Pillow converts; no colour profiles.
- 16-bit and 32-bit grey: the smallest of 8, 10, 12, 14 and 16 bits that holds the largest value is the full
  scale: a 16-bit photograph equals its 8-bit version, and a 12-bit scan is not black. With values below 0 or
  above 65,535: from the least to the largest.
- Floats: within [0, 1] or [0, 255] taken as such, else from the least to the largest; not finite counts as 0.
"""

import io
import logging
import re
import warnings
from functools import cache

import numpy as np
from PIL import Image

# Not pictures, need a program to be run (EPS), or only recognised by Pillow and not read.
EXCLUDED = frozenset({"EPS", "BUFR", "GRIB", "HDF5", "WMF", "MPEG", "IPTC"})
MAX_PIXELS = 178_956_970  # Pillow's own limit for a decompression bomb
DEPTHS = (8, 10, 12, 14, 16)
ORIENTATION = 0x0112  # EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PILLOW_LOG = logging.getLogger("PIL")
QUIET = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


class Unreadable(Exception):
    """The bytes cannot be had, or cannot be decoded as a picture; the message says why."""


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, at_least: int | None = None) -> Image.Image:
    """Decode a picture to mode RGB.

    From the first call on, Pillow's warnings and log, which go to standard error, are off in this process:
    what matters about a file is said by the exception.

    Args:
        max_pixels: refuse larger pictures before decoding them. Pillow refuses above `MAX_PIXELS` by itself.
        at_least: a JPEG may be decoded at 1/2, 1/4 or 1/8 as long as its short side keeps this many pixels.

    Raises:
        Unreadable: not a picture, cut off, damaged, empty, or larger than `max_pixels`.
    """
    _quieten()
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
        if image.width * image.height > max_pixels:
            raise Unreadable(f"{image.width} x {image.height} pixels are more than {max_pixels:,}")
        if at_least is not None and image.format in ("JPEG", "MPO"):
            image.draft(None, (at_least, at_least))
        image.load()
        picture = _to_rgb(_upright(image))
    except Unreadable:
        raise
    except Exception as error:  # damaged files make Pillow raise nearly anything: SyntaxError, struct.error
        raise Unreadable(reason_of(data, error)) from error
    picture.info = {}  # what it said, the orientation above all, holds no longer
    return picture


def opened(data: bytes) -> Image.Image:
    """The picture as it is stored, in its own mode, loaded. Raises whatever Pillow does."""
    _quieten()
    image = Image.open(io.BytesIO(data), formats=_formats())
    image.load()
    return image


def jpeg_header(data: bytes) -> tuple[int, int] | None:
    """Height and width of an RGB JPEG that is stored upright, from its header; None for everything else."""
    _quieten()
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
    except Exception:  # no JPEG
        return None
    plain = image.format == "JPEG" and image.mode == "RGB" and _turn(image) is None
    return (image.height, image.width) if plain else None


@cache
def picture_extensions() -> frozenset[str]:
    """Lower-case file extensions, without the dot, of the formats that `decode` reads."""
    formats = set(_formats())
    known = Image.registered_extensions().items()
    return frozenset(extension[1:].lower() for extension, kind in known if kind in formats)


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    usual = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # tried first
    return (*usual, *(kind for kind in Image.OPEN if kind not in EXCLUDED and kind not in usual))


def _quieten() -> None:
    """Put our filter first where it is not; `catch_warnings` is not safe in threads before Python 3.14."""
    if not warnings.filters or warnings.filters[0] != QUIET:
        warnings.filterwarnings("ignore", module=QUIET[3].pattern)
    if PILLOW_LOG.level == logging.NOTSET:
        PILLOW_LOG.setLevel(logging.CRITICAL)


def _upright(image: Image.Image) -> Image.Image:
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What would set the picture upright, as its EXIF says."""
    if image.format == "JPEG" and not {"exif", "xmp"} & image.info.keys():
        return None  # saves a tenth of the time of a small picture
    try:
        return UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF says nothing; the pixels are all right
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        # Others may hold on to their decoder's memory, or to an orientation that has been dealt with.
        return image if image.format == "JPEG" and "exif" not in image.info else image.copy()
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_eight_bit(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBa", "La"):
        image = image.convert(image.mode.upper())
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        return _over_white(image.convert("RGBA"))
    return image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    page = Image.new("RGB", image.size, (255, 255, 255))
    page.paste(image, mask=image.getchannel("A"))
    return page


def _eight_bit(values: np.ndarray) -> np.ndarray:
    """Integers or floats of any range as 8-bit grey; see the module's docstring."""
    strips = np.array_split(values, min(len(values), 1 + (values.size >> 20)))  # bounds the memory
    least = min(float(_finite(strip).min()) for strip in strips)
    most = max(float(_finite(strip).max()) for strip in strips)
    scales = (1.0, 255.0) if values.dtype.kind == "f" else tuple(float(2**bits - 1) for bits in DEPTHS)
    scale = next((scale for scale in scales if least >= 0 and most <= scale), None)
    lowest = 0.0 if scale else least
    factor = 255.0 / (scale or (most - least) or 1.0)
    return np.concatenate([np.rint((_finite(strip) - lowest) * factor).astype(np.uint8) for strip in strips])


def _finite(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)


def reason_of(data: bytes, error: Exception) -> str:
    """What is wrong with these bytes, in one line."""
    if not data:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture of a known format"
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
