"""Crops of thumbnails: averaging over boxes, trying many boxes at once, and moving a box until it fits.

A box is x0, width, y0, height as shares of the picture it lies in.
"""

from collections.abc import Sequence
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from curation.looks import THUMB

Array = NDArray[np.floating]  # float32 throughout
Rows = NDArray[np.int64]

COARSE = 8
SMALL = THUMB // 4
STRETCH = 0.16  # the two axes of a crop may differ by this much in log scale, coarsely
WHOLE = np.array([0, 1, 0, 1], np.float32)


class Crops:
    """The boxes that are tried: every pair of stretches of the two axes, of nearly the same length."""

    def __init__(self, scales: Sequence[float], step: float) -> None:
        """`scales`: sides of crops; `step`: at most so far from one to the next."""
        stretches = []
        for scale in scales:
            steps = int(np.ceil((1 - scale) / step - 1e-9))
            stretches += [(start, scale) for start in np.linspace(0, 1 - scale, steps + 1)]
        self._stretches = np.array(stretches, dtype=np.float32)

    @cached_property
    def boxes(self) -> Array:
        """[crops, 4] of all pairs of stretches, those that differ too much among them."""
        count = len(self._stretches)
        return np.concatenate(
            [np.tile(self._stretches, (count, 1)), self._stretches.repeat(count, axis=0)], axis=1
        )

    def correlations(self, pictures: Array, vectors: Array) -> Array:
        """[n, m, crops] of [n, m, 64] `whole_vectors` with every box of [n, 16, 16] pictures.

        The vectors have no mean and slope, so those of the boxes only count for how long these are.
        """
        cells, count = COARSE, len(self._stretches)
        found = (self._sampling @ pictures).reshape(-1, SMALL) @ self._sampling.T
        crops = found.reshape(len(pictures), cells, count, cells, count).transpose(0, 1, 3, 2, 4)
        crops = np.ascontiguousarray(crops).reshape(len(pictures), cells * cells, -1)
        level = _plane(cells).T @ crops
        square = np.einsum("nkc,nkc->nc", crops, crops) - np.einsum("nkc,nkc->nc", level, level)
        return vectors @ crops * (self._even / _lengths(square, cells * cells))[:, None]

    @cached_property
    def _sampling(self) -> Array:
        """[8 * m, 16] weights: of the first cell of each of the m stretches, then of the second, ..."""
        weights = box_weights(self._stretches[:, 0], self._stretches[:, 1], COARSE, SMALL)
        return np.ascontiguousarray(weights.swapaxes(0, 1)).reshape(-1, SMALL)

    @cached_property
    def _even(self) -> Array:
        """[crops] 1 for boxes whose axes differ little, or that are whole along one, between bars; else 0."""
        sides = self.boxes[:, 1::2]
        apart = np.abs(np.log(sides[:, 0] / sides[:, 1]))
        return ((apart <= STRETCH) | (sides.max(axis=1) == 1)).astype(np.float32)


FEW = Crops((1.0, 0.88, 0.77, 0.67), 0.12)
MANY = Crops((1.0, 0.93, 0.86, 0.8, 0.74, 0.68), 0.08)


def whole_vectors(pictures: Array) -> Array:
    """[n, 64] normalised 8 x 8 luma of [n, 16, 16] pictures."""
    return normal(halved(pictures).reshape(-1, COARSE * COARSE))


def warp(pictures: Array, box: Array, cells: int) -> Array:
    """[n, cells, cells] means of [n, size, size] pictures over the cells of their boxes."""
    size = pictures.shape[1]
    across = box_weights(box[:, 0], box[:, 1], cells, size)
    down = box_weights(box[:, 2], box[:, 3], cells, size)
    return down @ pictures @ across.transpose(0, 2, 1)


def refine(target: Array, outer: Array, box: Array, *, rounds: int) -> Array:
    """Move and resize boxes in `outer` until they show `target`, up to gain, offset and slope.

    Gauss-Newton with the mean of both pictures' gradients (Lucas and Kanade 1981; Baker and Matthews 2004).

    Args:
        target: [n, cells, cells].
        outer: [n, size, size].
        box: [n, 4], near the answer by about a cell.
    """
    if not len(box):
        return box
    cells = target.shape[1]
    target = _flat_normal(target)
    middle = (np.arange(cells, dtype=np.float32) + np.float32(0.5)) / cells
    box = box.copy()
    for _ in range(rounds):
        seen = _flat_normal(warp(outer, box, cells))
        slope = (seen + target) / 2
        across = np.gradient(slope, axis=2) * (cells / box[:, 1, None, None])
        down = np.gradient(slope, axis=1) * (cells / box[:, 3, None, None])
        change = np.stack([across, across * middle, down, down * middle[:, None]], axis=1)
        change = change.reshape(len(box), 4, -1)
        error = (target - seen).reshape(len(box), -1, 1)
        square = change @ change.transpose(0, 2, 1)
        damping = np.float32(1e-3) * (np.trace(square, axis1=1, axis2=2) + np.float32(1e-6))
        square += damping[:, None, None] * np.eye(4, dtype=np.float32)
        box += np.linalg.solve(square, change @ error)[..., 0].clip(-0.06, 0.06)
        box[:, 1::2] = box[:, 1::2].clip(0.6, 1.04)
        box[:, 0::2] = box[:, 0::2].clip(-0.03, 1.03 - box[:, 1::2])
    return box


def box_weights(start: Array, length: Array, cells: int, size: int) -> Array:
    """[n, cells, size] weights that average an axis of `size` pixels over equal cells of a stretch of it.

    What lies outside the picture takes the value of its edge.
    """
    steps = np.linspace(0, 1, cells + 1, dtype=np.float32)
    edges = (start[:, None] + length[:, None] * steps) * size
    passed = edges[:, :, None] - np.arange(size, dtype=np.float32)
    first, last = passed[:, :, 0].copy(), passed[:, :, -1].copy()
    np.clip(passed, 0, 1, out=passed)
    passed[:, :, 0], passed[:, :, -1] = first.clip(-size, 1), last.clip(0, size)
    weights = passed[:, 1:] - passed[:, :-1]
    weights *= (cells / (length * size))[:, None, None]
    return weights


def normal(vectors: Array) -> Array:
    """Remove mean and slope (a plane) from [n, cells * cells], and bring to length 1; blank ones become 0."""
    plane = _plane(round(vectors.shape[1] ** 0.5))
    rest = vectors - (vectors @ plane) @ plane.T
    return rest / _lengths(np.einsum("nc,nc->n", rest, rest), vectors.shape[1])[:, None]


def _lengths(squares: Array, cells: int) -> Array:
    """Roots, at least half a level (of 255) in every cell."""
    return np.maximum(np.sqrt(squares.clip(0)), np.float32(0.5 * cells**0.5))


def halved(pictures: Array) -> Array:
    """[n, size / 2, size / 2] means of 2 x 2 cells."""
    rows = pictures[:, 0::2] + pictures[:, 1::2]
    return (rows[:, :, 0::2] + rows[:, :, 1::2]) / np.float32(4)


def _flat_normal(pictures: Array) -> Array:
    return normal(pictures.reshape(len(pictures), -1)).reshape(pictures.shape)


@cache
def _plane(cells: int) -> Array:
    """[cells * cells, 3] orthonormal: constant, slope across, slope down."""
    ramp = np.linspace(-1, 1, cells)
    level, across = np.ones((cells, cells)), np.tile(ramp, (cells, 1))
    basis = np.stack([level, across, across.T]).reshape(3, -1)
    return (basis / np.linalg.norm(basis, axis=1, keepdims=True)).T.astype(np.float32)
