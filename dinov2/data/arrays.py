"""From a file's bytes to numbers of any depth and any count of channels: what `decode` would round to 8 bits.

- `.npy` arrays and TIFF of any type, [height, width], [height, width, channels] or [channels, height, width];
  of a TIFF of several pages the first series, so that a page can be a channel.
- PNG, JPEG and whatever else Pillow opens; of grey PNG all 16 bits. Pillow keeps 8 of the 16 bits of a colour
  PNG: those are refused, with the advice to store them as TIFF or .npy.
- Grey is repeated where three channels are wanted, colour becomes its luma where one is, and an alpha channel
  is left out where it is one too many. Nothing else is guessed.
- Pictures are taken as they are stored: orientation tags are for cameras' JPEG files, which `decode` reads.
"""

import io
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from dinov2.data.decode import MAX_PIXELS, Unreadable, opened, reason_of

NPY, PNG = b"\x93NUMPY", b"\x89PNG"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R 601, as Pillow's
DEEP_MODES = ("L", "LA", "RGB", "RGBA", "CMYK", "I", "F")  # and I;16 of either byte order


def decode_array(
    data: bytes, channels: int, value_range: Sequence[float] = (), *, max_pixels: int = MAX_PIXELS
) -> Float[NDArray[np.float32], "channels height width"]:
    """Decode a picture to float32 in 0 to 1.

    Args:
        value_range: the values that become 0 and 1; what lies outside is clipped, and what is not finite
            becomes 0. By default 0 and the largest value of the type: 255, 65,535, or 1.0 for floats.

    Raises:
        Unreadable: not a picture or array, cut off, damaged, or of another number of channels.
    """
    try:
        array = _array(data)
        if array.ndim not in (2, 3) or not array.size:
            raise Unreadable(f"an array of shape {list(array.shape)} is no picture")
        planes = _planes(array, channels)
        if planes.shape[1] * planes.shape[2] > max_pixels:
            raise Unreadable(f"{planes.shape[2]} x {planes.shape[1]} pixels are more than {max_pixels:,}")
        return _match(_scaled(planes, value_range), channels)
    except Unreadable:
        raise
    except Exception as error:  # damaged files make the decoders raise nearly anything
        raise Unreadable(reason_of(data, error)) from error


def _array(data: bytes) -> NDArray[Any]:
    if data.startswith(NPY):
        return np.load(io.BytesIO(data), allow_pickle=False)
    if data.startswith(TIFF):
        return _tiff(data)
    if data.startswith(PNG) and len(data) > 25 and data[24] == 16 and data[25] != 0:
        raise Unreadable("a colour PNG of 16 bits would be read with 8; store it as TIFF or .npy")
    return _by_pillow(data)


def _tiff(data: bytes) -> NDArray[Any]:
    """By tifffile, which knows every type; else by Pillow, which knows more compressions."""
    import tifffile  # slow to import, and only needed here

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            array = file.series[0].asarray()
            return array if array.ndim <= 3 else array.squeeze()
    except (ValueError, RuntimeError) as error:
        if "imagecodecs" not in str(error):
            raise
    image = opened(data)
    bits = np.atleast_1d(image.tag_v2.get(258, 8))  # pyright: ignore[reportAttributeAccessIssue]  # a TIFF
    if len(bits) > 1 and max(bits) > 8:
        raise Unreadable(
            "a compressed TIFF of several deep channels; store it as deflate, uncompressed or .npy"
        )
    return _by_pillow(data)


def _by_pillow(data: bytes) -> NDArray[Any]:
    image = opened(data)
    if image.mode == "I" and image.format == "PNG":  # 16 bits, in 32
        return np.asarray(image).astype(np.uint16)
    if not (image.mode in DEEP_MODES or image.mode.startswith("I;16")):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return np.asarray(image)


def _planes(array: NDArray[Any], channels: int) -> NDArray[Any]:
    """[channels, height, width]. Where both ends could be the channels, the last is, as in most files."""
    if array.ndim == 2:
        return array[None]
    first, last = array.shape[0], array.shape[2]
    is_last = last == channels or (first != channels and last <= first)
    return np.moveaxis(array, 2, 0) if is_last else array


def _scaled(planes: NDArray[Any], value_range: Sequence[float]) -> NDArray[np.float32]:
    if value_range:
        low, high = value_range
    else:
        low, high = 0.0, float(np.iinfo(planes.dtype).max) if planes.dtype.kind in "iu" else 1.0
    scaled = (planes.astype(np.float64) - low) / (high - low)
    return np.nan_to_num(scaled, nan=0.0, posinf=0.0, neginf=0.0).clip(0, 1).astype(np.float32)


def _match(planes: NDArray[np.float32], channels: int) -> NDArray[np.float32]:
    there = len(planes)
    if there == channels + 1 and there in (2, 4):  # grey or colour with alpha
        planes, there = planes[:channels], channels
    if there == channels:
        return np.ascontiguousarray(planes)
    if there == 1 and channels == 3:
        return np.repeat(planes, 3, axis=0)
    if there == 3 and channels == 1:
        return np.tensordot(LUMA, planes, axes=1)[None]
    raise Unreadable(
        f"it has {there} channels, and {channels} are wanted (as many as augment.mean has numbers)"
    )
