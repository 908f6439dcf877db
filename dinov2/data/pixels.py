"""From a file's bytes to uint8 planes to cut crops from: JPEGs by simplejpeg where it is installed.

simplejpeg gives Pillow's pixels, as both call the same decoder the same way, without Pillow's detours: three
fifths of the time with the copy into a tensor.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from PIL import Image
from torch import Tensor

from dinov2.data.decode import MAX_PIXELS, decode, jpeg_header

Pixels = Shaped[Tensor, "channels height width"]  # uint8, or float32 from 0 to 1
Crops = Shaped[Tensor, "crops channels height width"]


def as_pixels(image: Image.Image) -> UInt8[Tensor, "channels height width"]:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_pixels(data: bytes, at_least: int | None = None) -> UInt8[Tensor, "channels height width"]:
    """The pixels of `decode`; channels are last in memory.

    Raises:
        Unreadable: as `decode` says.
    """
    simplejpeg, header = _simplejpeg(), jpeg_header(data)
    if simplejpeg is None or header is None or header[0] * header[1] > MAX_PIXELS:
        return as_pixels(decode(data, at_least=at_least))
    height, width = header
    part = next((n for n in (8, 4, 2) if at_least and min(header) >= n * at_least), 1)
    try:
        pixels = simplejpeg.decode_jpeg(data, min_height=-(-height // part), min_width=-(-width // part))
    except ValueError:  # damaged: Pillow says how, or can read it all the same
        return as_pixels(decode(data, at_least=at_least))
    return torch.from_numpy(pixels).permute(2, 0, 1)


@cache
def _simplejpeg() -> Any:
    """The module, or None: it comes with the extra `fast`."""
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg
