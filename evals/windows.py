"""Pictures of any size as windows that a backbone sees, and answers of windows as one of the picture.

A picture is resized so that its short side has a given number of pixels, and is cut into square windows that
overlap by a third at least. Sides shorter than a window are rounded to whole patches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from dinov2.features import as_tensor

STRIDE = 2 / 3  # of a window, from one to the next at most
STRIP = 1 << 24  # scores that are enlarged at once


@dataclass(frozen=True)
class Tiling:
    """Where the windows of a picture lie.

    Attributes:
        picture: its (width, height).
        width, height: of the picture as it is resized.
        window: (height, width) of each window, multiples of the patch.
        patch: pixels along a side of a patch.
    """

    picture: tuple[int, int]
    width: int
    height: int
    window: tuple[int, int]
    patch: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of a window."""
        return self.window[0] // self.patch, self.window[1] // self.patch

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the picture."""
        return self.picture[1], self.picture[0]

    @cached_property
    def corners(self) -> list[tuple[int, int]]:
        """Top and left of each window, row by row."""
        tops, lefts = _starts(self.height, self.window[0]), _starts(self.width, self.window[1])
        return [(top, left) for top in tops for left in lefts]

    def cut(self, image: Image.Image) -> UInt8[Tensor, "windows 3 height width"]:
        whole = as_tensor(image.resize((self.width, self.height), Image.Resampling.BICUBIC))
        high, wide = self.window
        return torch.stack([whole[:, top : top + high, left : left + wide] for top, left in self.corners])

    def cut_truth(self, truth: np.ndarray) -> Tensor:
        """The truth [height, width] under each window: that of the nearest pixel."""
        rows = (np.arange(self.height) + 0.5) * truth.shape[0] / self.height
        columns = (np.arange(self.width) + 0.5) * truth.shape[1] / self.width
        whole = torch.from_numpy(truth[np.ix_(rows.astype(np.int64), columns.astype(np.int64))])
        high, wide = self.window
        return torch.stack([whole[top : top + high, left : left + wide] for top, left in self.corners])

    def stitch(self, scores: Float[Tensor, "windows outputs rows columns"]) -> Float[Tensor, "outputs h w"]:
        """Scores of windows, on any grid, as those of the picture: where windows overlap, their mean."""
        high, wide = self.window
        if len(self.corners) == 1:
            return scores[0]
        total = scores.new_zeros(scores.shape[1], self.height, self.width)
        count = scores.new_zeros(self.height, self.width)
        for one, (top, left) in zip(scores, self.corners, strict=True):
            total[:, top : top + high, left : left + wide] += enlarged(one, (high, wide))
            count[top : top + high, left : left + wide] += 1
        return total / count


@dataclass(frozen=True)
class Tiler:
    """Sizes of pictures to tilings: short sides of `short` pixels, windows of `window`, whole patches."""

    short: int
    window: int
    patch: int

    def __call__(self, size: tuple[int, int], scale: float = 1.0) -> Tiling:
        """For a picture of `size` (width, height), made `scale` times larger than usual."""
        ratio = scale * self.short / min(size)
        wide, high = (self._side(side * ratio) for side in size)
        return Tiling(size, wide, high, (min(high, self.window), min(wide, self.window)), self.patch)

    def _side(self, length: float) -> int:
        """A side of the resized picture: at least a window, or whole patches."""
        if round(length) >= self.window:
            return round(length)
        return max(1, round(length / self.patch)) * self.patch


def enlarged(scores: Float[Tensor, "outputs h w"], size: Sequence[int]) -> Float[Tensor, "outputs H W"]:
    """Bilinear, corners not aligned."""
    return interpolate(scores[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


def best_class(scores: Float[Tensor, "classes h w"], size: tuple[int, int]) -> Tensor:
    """The best class of each pixel of the picture, of `size` (height, width), int64 [height, width].

    Enlarges strip by strip, since all classes of all pixels would not fit for a large picture.
    """
    high, wide = size
    rows = max(1, STRIP // (len(scores) * wide))
    return torch.cat(
        [_strip(scores, size, range(top, min(top + rows, high))) for top in range(0, high, rows)]
    )


def _strip(scores: Tensor, size: tuple[int, int], rows: range) -> Tensor:
    """Some rows of the enlarged scores' argmax: bilinear is linear in rows, then in columns."""
    place = (torch.tensor(rows, dtype=torch.float64) + 0.5) * scores.shape[1] / size[0] - 0.5
    place = place.clamp(min=0)
    above = place.long().clamp(max=scores.shape[1] - 1)
    below = (above + 1).clamp(max=scores.shape[1] - 1)
    share = (place - above).to(scores)[:, None]
    above, below = above.to(scores.device), below.to(scores.device)
    some = scores[:, above] * (1 - share) + scores[:, below] * share
    return enlarged(some, (len(rows), size[1])).argmax(0)


def _starts(length: int, window: int) -> list[int]:
    """Where windows begin so that they reach from end to end, evenly, and overlap enough."""
    count = 1 + math.ceil((length - window) / (window * STRIDE))
    return [round(number * (length - window) / max(1, count - 1)) for number in range(count)]
