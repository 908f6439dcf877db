"""Crops of thumbnails: averaging over boxes, trying many boxes at once, and moving a box until it fits.

A box is x0, width, y0, height as shares of the picture it lies in.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from curation.looks import THUMB

Array = NDArray[np.floating]  # float32 throughout
Rows = NDArray[np.int64]

COARSE = 12
MIDDLE = THUMB // 2
SCALES = (1.0, 0.93, 0.86, 0.8, 0.74, 0.68)
STRETCH = 0.16  # the two axes of a crop may differ by this much in log scale, coarsely
STEP = 0.08  # between the crops that are tried
WHOLE = np.array([0, 1, 0, 1], np.float32)


@cache
def boxes() -> Array:
    """[crops, 4] that are tried."""
    _, columns, rows = _sampling()
    intervals = _intervals()
    return np.concatenate([intervals[columns], intervals[rows]], axis=1)


def crop_correlations(picture: Array, vectors: Array) -> Array:
    """[n, crops] correlations of [n, 144] `whole_vectors` with every box of one [32, 32] picture.

    The vectors have no mean and slope, so those of the boxes only count for how long these are.
    """
    matrix, columns, rows = _sampling()
    count = len(matrix) // COARSE
    sampled = (matrix @ picture @ matrix.T).reshape(count, COARSE, count, COARSE)
    crops = sampled[rows, :, columns, :].reshape(len(rows), -1)
    shares = crops @ np.concatenate([vectors.T, _plane(COARSE)], axis=1)
    level = shares[:, len(vectors) :]
    length = np.einsum("nc,nc->n", crops, crops) - np.einsum("nc,nc->n", level, level)
    return shares[:, : len(vectors)].T / _lengths(length, COARSE * COARSE)


def whole_vectors(pictures: Array) -> Array:
    """[n, 144] normalised 12 x 12 luma of [n, size, size] pictures."""
    size = pictures.shape[1]
    weights = box_weights(np.zeros(1, np.float32), np.ones(1, np.float32), COARSE, size)[0]
    return normal((weights @ pictures @ weights.T).reshape(len(pictures), -1))


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
    low, high = np.zeros(size, np.float32), np.ones(size, np.float32)
    low[0], high[-1] = -size, size
    passed = np.clip(edges[:, :, None] - np.arange(size, dtype=np.float32), low, high)
    return np.diff(passed, axis=1) * (cells / (length * size))[:, None, None]


def normal(vectors: Array) -> Array:
    """Remove mean and slope (a plane) from [n, cells * cells], and bring to length 1; blank ones become 0."""
    plane = _plane(round(vectors.shape[1] ** 0.5))
    rest = vectors - (vectors @ plane) @ plane.T
    return rest / _lengths(np.einsum("nc,nc->n", rest, rest), vectors.shape[1])[:, None]


def _lengths(squares: Array, cells: int) -> Array:
    """Roots, at least half a level (of 255) in every cell."""
    return np.maximum(np.sqrt(squares.clip(0)), np.float32(0.5 * cells**0.5))


def correlation(first: Array, second: Array) -> Array:
    """[n] of [n, cells, cells] pairs, mean and slope removed."""
    return (normal(first.reshape(len(first), -1)) * normal(second.reshape(len(second), -1))).sum(axis=1)


def halved(pictures: Array) -> Array:
    """[n, size / 2, size / 2] means of 2 x 2 cells."""
    rows = pictures[:, 0::2] + pictures[:, 1::2]
    return (rows[:, :, 0::2] + rows[:, :, 1::2]) / np.float32(4)


def _flat_normal(pictures: Array) -> Array:
    return normal(pictures.reshape(len(pictures), -1)).reshape(pictures.shape)


@cache
def _intervals() -> Array:
    """[m, 2] start and length of the stretches of an axis that a tried crop may take."""
    found = []
    for scale in SCALES:
        steps = int(np.ceil((1 - scale) / STEP - 1e-9))
        found += [(start, scale) for start in np.linspace(0, 1 - scale, steps + 1)]
    return np.array(found, dtype=np.float32)


@cache
def _sampling() -> tuple[Array, Rows, Rows]:
    """[m * 12, 32] weights of all intervals, and the pairs of intervals that make a box."""
    intervals = _intervals()
    matrix = box_weights(intervals[:, 0], intervals[:, 1], COARSE, MIDDLE).reshape(-1, MIDDLE)
    apart = np.abs(np.log(intervals[:, None, 1] / intervals[None, :, 1]))
    columns, rows = np.nonzero(apart <= STRETCH)
    return matrix, columns, rows


@cache
def _plane(cells: int) -> Array:
    """[cells * cells, 3] orthonormal: constant, slope across, slope down."""
    ramp = np.linspace(-1, 1, cells)
    level, across = np.ones((cells, cells)), np.tile(ramp, (cells, 1))
    basis = np.stack([level, across, across.T]).reshape(3, -1)
    return (basis / np.linalg.norm(basis, axis=1, keepdims=True)).T.astype(np.float32)
