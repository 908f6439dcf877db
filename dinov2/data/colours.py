"""Brightness, contrast, saturation, hue and grey of one crop: Pillow's pixels in about a third of its time.

A crop is three planes of whole numbers from 0 to 255 in float32, changed in place by passes over whole
planes. Every step rounds where Pillow's does (`Image.blend`, `Image.convert`), which float32 holds exactly:
but for hue, the numbers are Pillow's own. Hue is a closed form of its way to HSV of 8 bits and back. Where a
hue falls onto a step of these 8 bits, roundings within Pillow decide; there the two may differ by that step,
in about one pixel of a thousand.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, UInt8

Planes = Float[np.ndarray, "3 height width"]
Plane = Float[np.ndarray, "height width"]

# of red, green and blue, times 65,536; their sums fit 24 bits
LUMA = np.array([19595, 38470, 7471], np.float32)
TURN = 255  # Pillow's hues to a turn, though they go round at 256
PEAKS = (3 * TURN, 2 * TURN, 4 * TURN)  # the middles of red's valley, green's and blue's hill; a turn has 6
TINY = np.float32(1e-6)  # keeps black and grey from dividing by zero, and vanishes in every other sum


def recoloured(
    crop: UInt8[np.ndarray, "3 height width"], changes: list[tuple[int, float]], grey: bool
) -> UInt8[np.ndarray, "3 height width"]:
    """The crop after changes (index into COLOURS, amount), one after the other, and then grey where asked."""
    planes = crop.astype(np.float32)
    for index, amount in changes:
        COLOURS[index](planes, amount)
    if grey:
        planes[:] = luma(planes)
    return planes.astype(np.uint8)


def luma(planes: Planes) -> Plane:
    """Pillow's grey (`convert("L")`): whole numbers."""
    grey = np.einsum("c,chw->hw", LUMA, planes)  # no BLAS: it would start threads
    grey += 32768
    grey *= np.float32(2**-16)
    return np.trunc(grey, out=grey)


def adjust_brightness(planes: Planes, amount: float) -> None:
    planes *= np.float32(amount)
    _cut_off(planes)


def adjust_contrast(planes: Planes, amount: float) -> None:
    grey = luma(planes)
    _blend(planes, np.float32(int(grey.sum(dtype=np.float64) / grey.size + 0.5)), amount)


def adjust_saturation(planes: Planes, amount: float) -> None:
    _blend(planes, luma(planes), amount)


def _blend(planes: Planes, other: Plane | np.float32, amount: float) -> None:
    """other + amount * (planes - other), in this order: where both are equal, so is the result."""
    planes -= other
    planes *= np.float32(amount)
    planes += other
    _cut_off(planes)


def _cut_off(planes: Planes) -> None:
    torch.from_numpy(planes).clamp_(0, 255)  # numpy's with constants takes thrice as long
    np.trunc(planes, out=planes)


def adjust_hue(planes: Planes, amount: float) -> None:
    """Turns the hue by `amount` turns; saturation and value stay.

    With the hue h in sixths of a turn, from red, a channel is value * (1 - saturation * w), where w is
    clip(2 - |h - 3|, 0, 1) for red and 1 - clip(2 - |h - 2 or 4|, 0, 1) for green and blue. Back from the
    channels, h = 3 -+ (2 * most - least + red - green - blue) / (most - least), + where blue > green.
    """
    whole = planes.astype(np.int16)
    most, least = whole.max(axis=0), whole.min(axis=0)
    value, spread = most.astype(np.float32), (most - least).astype(np.float32)
    hue = _hue(whole, most, least, spread)
    hue += np.uint8(int(255 * amount) % 256)  # as torchvision's, and round at 256
    depth = _saturation(spread, value)
    depth *= value
    depth *= np.float32(1 / TURN**2)  # of the colour in value's own unit, for waves from 0 to TURN
    sixths = np.multiply(hue, 6, dtype=np.int16)
    for plane, peak in zip(planes, PEAKS, strict=True):
        plane[:] = _wave(sixths, peak)
    planes *= depth
    value += np.float32(0.5)  # so that cutting off rounds
    np.subtract(value, planes[0], out=planes[0])
    depth *= TURN
    value -= depth
    planes[1:] += value
    np.trunc(planes, out=planes)


def _hue(
    whole: np.ndarray, most: np.ndarray, least: np.ndarray, spread: Plane
) -> UInt8[np.ndarray, "height width"]:
    """Pillow's hue of whole numbers in int16: `TURN` to a turn, cut off."""
    red, green, blue = whole
    most += most
    most -= least
    most += red
    most -= green
    most -= blue
    side = green - blue
    side |= 1  # no colour between green and blue counts as green
    most *= np.sign(side, out=side)
    hue = most.astype(np.float32)
    hue /= spread + TINY
    hue *= np.float32(-TURN / 6)
    hue += np.float32(TURN / 2 + 5e-4)  # rounding keeps no hue below its step: these are 2e-3 apart
    return hue.astype(np.uint8)


def _saturation(spread: Plane, value: Plane) -> Plane:
    """Pillow's: 0 to 255, cut off."""
    saturation = spread * 255
    saturation += np.float32(1e-3)  # as in `_hue`; more than TINY takes away
    saturation /= value + TINY
    return np.trunc(saturation, out=saturation)


def _wave(sixths: np.ndarray, peak: int) -> np.ndarray:
    """A trapezium over the hue: TURN within a sixth of `peak`, 0 from two sixths on."""
    wave = sixths - np.int16(peak)
    np.abs(wave, out=wave)
    np.subtract(2 * TURN, wave, out=wave)
    torch.from_numpy(wave).clamp_(0, TURN)
    return wave


# by index in CropPlan.colours
COLOURS: tuple[Callable[[Planes, float], None], ...] = (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    adjust_hue,
)
