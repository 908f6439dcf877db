"""Which patches of which global crops the student does not see, block-wise (BEiT sec. 2.3, iBOT, DINOv2)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from dinov2.data.order import Permutation, derive_seed
from dinov2.exits import UserError

ATTEMPTS = 10  # rectangles that do not fit in a row before the rest is filled patch by patch


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """How much is masked, and in what shapes."""

    probability: float = 0.5  # share of the global crops that are masked; exact, not in expectation
    ratio: list[float] = field(default_factory=lambda: [0.1, 0.5])  # of a masked crop's patches, stratified
    min_patches: int = 4  # smallest rectangle
    aspect: float = 0.3  # height / width of the flattest rectangle; of the steepest 1 / aspect

    def __post_init__(self) -> None:
        if not (len(self.ratio) == 2 and 0 <= self.ratio[0] <= self.ratio[1] <= 1):
            raise UserError(f"masks: ratio={list(self.ratio)} should be two numbers, 0 <= low <= high <= 1")
        if not 0 <= self.probability <= 1:
            raise UserError(f"masks: probability={self.probability} should lie between 0 and 1")
        if self.min_patches < 1 or not 0 < self.aspect <= 1:
            raise UserError("masks: min_patches should be at least 1, and aspect above 0 and at most 1")


def draw_masks(
    config: MaskConfig, *, grid: tuple[int, int], crops: Sequence[int], total: int, seed: int, step: int
) -> Bool[Tensor, "crops patches"]:
    """Masks of some of a step's global crops; True is masked, patches row by row.

    `grid` is (rows, columns) of patches; `crops` are indices among all `total` global crops of the step over
    all ranks (view * global_batch + place in the batch). The result is a pure function of (seed, step, crop),
    so that any division among ranks gives the same masks. Of the `total`, exactly round(total * probability)
    are masked. The k-th of these, in random order, has its ratio drawn from the k-th of as many equal parts
    of `config.ratio`, and exactly round(ratio * patches) masked patches, at least one: as many rectangles as
    are found to fit, the rest single patches at random (2% of the masked patches on a 16 x 16 grid, 8% on
    8 x 8, 30% on 4 x 4).
    """
    masked = round(total * config.probability)
    strata = Permutation(total, derive_seed("strata", seed, step))
    masks = [_mask(config, grid, strata(crop), masked, (seed, step, crop)) for crop in crops]
    return _unpack(masks, grid[0] * grid[1])


def _mask(config: MaskConfig, grid: tuple[int, int], stratum: int, strata: int, key: tuple[int, ...]) -> int:
    """One crop's mask as the bits of an integer, patch 0 lowest; 0 where the crop is not among the masked."""
    if stratum >= strata:
        return 0
    random = Random(derive_seed("mask", *key))  # of Random only .random() is the same in every Python
    low, high = config.ratio
    ratio = low + (high - low) * (stratum + random.random()) / strata
    target = max(1, round(ratio * grid[0] * grid[1]))
    return _fill(_rectangles(config, grid, target, random), target, grid[0] * grid[1], random)


def _rectangles(config: MaskConfig, grid: tuple[int, int], target: int, random: Random) -> int:
    """Rectangles that cover at most `target` patches together, as many as are found to fit.

    Areas are uniform from `min_patches` to what is missing, aspects uniform in the logarithm, and both are
    then rounded to whole patches; rectangles may overlap.
    """
    rows, columns = grid
    columns_of_ones = _columns_of_ones(rows, columns)
    steepest = -math.log(config.aspect)
    mask, missing, failures = 0, target, 0
    while missing >= config.min_patches and failures < ATTEMPTS:
        area = config.min_patches + (missing - config.min_patches) * random.random()
        slope = math.exp((random.random() - 0.5) * steepest)  # the square root of the aspect
        height, width = round(math.sqrt(area) * slope), round(math.sqrt(area) / slope)
        down, right = random.random(), random.random()
        failures += 1
        if not (0 < height <= rows and 0 < width <= columns and height * width >= config.min_patches):
            continue
        corner = int(down * (rows - height + 1)) * columns + int(right * (columns - width + 1))
        rectangle = ((1 << width) - 1) * columns_of_ones[height] << corner
        new = (rectangle & ~mask).bit_count()
        if 0 < new <= missing:
            mask, missing, failures = mask | rectangle, missing - new, 0
    return mask


def _fill(mask: int, target: int, patches: int, random: Random) -> int:
    """Adds single patches at random until exactly `target` are masked."""
    missing = target - mask.bit_count()
    while missing:
        patch = 1 << int(random.random() * patches)
        if not mask & patch:
            mask, missing = mask | patch, missing - 1
    return mask


@lru_cache(maxsize=16)
def _columns_of_ones(rows: int, columns: int) -> list[int]:
    """For every height, the bits of a rectangle of that height and width 1 in the first column."""
    return [sum(1 << row * columns for row in range(height)) for height in range(rows + 1)]


def _unpack(masks: Sequence[int], patches: int) -> Bool[Tensor, "crops patches"]:
    size = -(-patches // 8)
    packed = np.frombuffer(b"".join(mask.to_bytes(size, "little") for mask in masks), dtype=np.uint8)
    bits = np.unpackbits(packed.reshape(len(masks), size), axis=1, count=patches, bitorder="little")
    return torch.from_numpy(bits).bool()
