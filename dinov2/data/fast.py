"""The augmentation with fewer roundings and in less time: the same plans, carried out otherwise.

Crops are read, cut and resized as in `dinov2.data.augment`. Brightness, contrast, saturation and grey are
linear, so that what is drawn of them becomes one 3 x 4 matrix, where the exact way rounds and cuts off after
each; hue, which is not linear, stands between two of these. Blur and colours are OpenCV's, on uint8.

Crops for a GPU are only cut and resized here; `dinov2.data.on_device` does the rest there.
"""

from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from dinov2.data.augment import (
    AugmentConfig,
    CropKind,
    CropPlan,
    MultiCrop,
    draw_plan,
    resized,
)
from dinov2.data.pixels import Crops, Pixels
from dinov2.exits import UserError

GREY = np.array([0.299, 0.587, 0.114])  # of red, green and blue: ITU-R BT.601, as Pillow has it
UNIT = np.eye(3, 4)  # matrices of what becomes of red, green, blue and 1
GREY_ROWS = np.tile([*GREY, 0.0], (3, 1))
HUE = 3  # in CropPlan.colours
Array = UInt8[np.ndarray, "height width 3"]


class Light(NamedTuple):
    """A change of light: own * pixel + grey * (its grey) + mean * (the mean grey of the crop)."""

    own: float = 1.0
    grey: float = 0.0
    mean: float = 0.0

    def then(self, index: int, amount: float) -> "Light":
        """Followed by a brightness (0), contrast (1) or saturation (2) of this amount.

        The weights of a grey sum to one, so that the grey of what this makes is (own + grey) * grey + mean.
        """
        own, grey, mean = (amount * part for part in self)
        rest = 1 - amount
        if index == 1:
            mean += rest * sum(self)
        elif index == 2:
            grey, mean = grey + rest * (self.own + self.grey), self.mean
        return Light(own, grey, mean)


UNCHANGED = Light()


class Change(NamedTuple):
    """What is done to a crop's colours: a change of light, a turn of the hue, another change of light."""

    before: Light
    hue: float  # in turns
    after: Light


def change_of(plan: CropPlan) -> Change:
    """The drawn colours as one change."""
    lights, hue = [Light()], 0.0
    for index, amount in [*plan.colours, *([(2, 0.0)] if plan.grey else [])]:
        if index == HUE:
            hue = amount
            lights.append(Light())
        else:
            lights[-1] = lights[-1].then(index, amount)
    return Change(lights[0], hue, lights[1] if len(lights) > 1 else Light())


def as_row(plan: CropPlan) -> list[float]:
    """What is left to the device: light, hue, light, sigma (0: none), whether to solarise (0 or 1)."""
    change = change_of(plan)
    return [*change.before, change.hue, *change.after, plan.sigma or 0.0, float(plan.solarise)]


class FastCrop(MultiCrop):
    """As `MultiCrop`, of RGB pictures of 8 bits: the same boxes, flips and amounts for the same seed.

    Args:
        later: only cut; colours, blur and solarisation are what `changes` says, for the device.
    """

    def __init__(self, config: AugmentConfig, *, later: bool = False) -> None:
        super().__init__(config)
        self.later = later
        if config.deep:
            raise UserError("augment.mode=fast is for RGB of 8 bits; take augment.mode=exact")
        _opencv()  # says what is missing before a worker does

    def at(self, seed: int, step: int) -> MultiCrop:
        return FastCrop(super().at(seed, step).config, later=self.later)

    def changes(self, picture: Image.Image | Pixels, seed: int) -> Float[Tensor, "crops 9"] | None:
        if not self.later:
            return None
        width, height = picture.size if isinstance(picture, Image.Image) else picture.shape[:0:-1]
        random = Random(seed)
        plans = [
            draw_plan(self.config, kind, height, width, random)
            for kind in self.global_kinds + self.local_kinds
        ]
        return torch.tensor([as_row(plan) for plan in plans])

    def _crops(self, pixels: Pixels, kinds: Sequence[CropKind], size: int, random: Random) -> Crops:
        _, height, width = pixels.shape
        crops = np.empty((len(kinds), 3, size, size), np.uint8)
        cv2 = _opencv()
        for planes, kind in zip(crops, kinds, strict=True):
            plan = draw_plan(self.config, kind, height, width, random)
            own = resized(pixels, plan.box, size).permute(1, 2, 0).numpy()
            own = cv2.flip(own, 1) if plan.flip else own
            cv2.split(own if self.later else edited(own, plan, self.config.blur_kernel), [*planes])
        return torch.from_numpy(crops)


def edited(crop: Array, plan: CropPlan, kernel: int) -> Array:
    """Colours, blur and solarisation of one crop; the crop itself stays as it was."""
    cv2 = _opencv()
    change = change_of(plan)
    crop = _lit(crop, change.before)
    if change.hue:
        crop = _turned(crop, change.hue)
    crop = _lit(crop, change.after)
    if plan.sigma is not None:
        crop = _blurred(crop, plan.sigma, kernel)
    return cv2.min(crop, cv2.bitwise_not(crop)) if plan.solarise else crop  # the lesser from 128 on


def _lit(crop: Array, light: Light) -> Array:
    if light == UNCHANGED:
        return crop
    cv2 = _opencv()
    mean = light.mean * cv2.mean(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY))[0] if light.mean else 0.0
    if not light.grey:  # OpenCV takes four times as long with a matrix that is diagonal
        return cv2.addWeighted(crop, light.own, crop, 0.0, mean)
    matrix = light.own * UNIT + light.grey * GREY_ROWS
    matrix[:, 3] = mean
    return cv2.transform(crop, matrix)


def _turned(crop: Array, hue: float) -> Array:
    cv2 = _opencv()
    hsv = cv2.cvtColor(crop, cv2.COLOR_RGB2HSV_FULL)
    row = np.zeros(3 * crop.shape[1], np.uint8)
    row[::3] = int(255 * hue) % 256  # goes round, as Pillow's
    flat = hsv.reshape(len(crop), -1)
    flat += row  # a whole row at once: four times as fast as every third number
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def _blurred(crop: Array, sigma: float, kernel: int) -> Array:
    """By two passes in floats: in half the time of OpenCV's own blur and not less exact."""
    reach = min(kernel // 2, int(3.7 * sigma))  # what is further out weighs less than a thousandth
    if not reach:
        return crop
    weights = _opencv().getGaussianKernel(2 * reach + 1, sigma)
    return _opencv().sepFilter2D(crop, -1, weights, weights)


@cache
def _opencv() -> Any:
    """OpenCV, which then uses the calling thread alone."""
    try:
        import cv2
    except ImportError as error:
        raise UserError("augment.mode=fast wants OpenCV: pip install 'dinov2-pipeline[fast]'") from error
    cv2.setNumThreads(1)
    return cv2
