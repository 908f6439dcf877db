"""A second, independent look at a candidate pair: can one picture be laid over the other?

Embeddings and hashes say that two pictures are alike; two windows on one meadow, or two shirts laid out
on one table, are alike too. Here one thumbnail is laid over the other as a whole or as a crop of it, with
the luma's gain and offset left free, and what remains decides. Three steps, each on fewer pairs:

1. coarse: the 12 x 12 luma of one picture against some 200 crops of the other (normalised correlation);
2. fine: from the best crops, Gauss-Newton on position and size of the crop, each axis by itself, at 16 x 16
   and then 32 x 32 (Lucas and Kanade 1981; Baker and Matthews 2004);
3. score: the correlation of the detail. Detail is what differs from the mean of the 3 x 3 neighbourhood,
   divided
   by its local spread plus a noise floor. So slow changes (sky, shading) count for nothing, a strong
   outline counts no more than the faint fabric inside it, and grain below the noise floor counts for
   little.

A picture without detail, such as clear sky, can be told from its like by its levels only: such pairs
count if, with nothing moved or fitted, no cell differs much and even the grain agrees a little.

Everything is batched numpy on one thread, so that results do not depend on the number of processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from curation.looks import THUMB, luma

COARSE = 12
SCALES = (1.0, 0.93, 0.86, 0.8, 0.74, 0.68)
STRETCH = 0.16  # the two axes of a crop may differ by this much in log scale, coarsely
WORTH_COARSE = 0.5  # coarse correlation from which a crop is refined
WORTH_FINE = 0.6  # correlation at 16 x 16 from which it is refined further
UNMOVED = 0.03  # boxes that differ from the whole by no more than this are no crops
COVERED = 0.2  # power of the detail, of at most 1, from which it vouches for a crop
TRIED = 3  # crops that are refined for each pair and direction
BATCH = 512  # pairs at a time
NOISE = 1.5  # levels (of 255) of noise in a cell of a 32 x 32 thumbnail, from compression and resampling

Array = NDArray[np.floating]  # float32 throughout
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Alignment:
    """How n pairs (a, b) lie over each other."""

    score: Array  # 0 to 1: the larger of `detail` and `level`
    detail: Array  # correlation of the aligned detail
    level: Array  # 1 minus the largest difference of a cell / 40 levels; less where chance could do it
    forward: NDArray[np.bool_]  # a lies in b; else b lies in a
    box: Array  # [n, 4] where: x0, width, y0, height in the outer picture, in [0, 1]


def align(thumbs: NDArray[np.uint8], pairs: NDArray[np.int64]) -> Alignment:
    """Lay the pictures of each pair over each other, either inside the other.

    Args:
        thumbs: [n, 64, 64, 3].
        pairs: [p, 2] rows of `thumbs`.
    """
    grey = luma(thumbs)
    level = _level(thumbs, pairs)
    detail = np.zeros(len(pairs), np.float32)
    forward = np.ones(len(pairs), bool)
    box = np.tile(np.array([0, 1, 0, 1], np.float32), (len(pairs), 1))
    for ahead in (True, False):
        inner, outer = pairs.T if ahead else pairs.T[::-1]
        rows, at = _promising(grey, inner, outer)
        found, at = _finished(grey, inner[rows], outer[rows], at)
        better = found > detail[rows]
        rows = rows[better]
        detail[rows], box[rows], forward[rows] = found[better], at[better], ahead
    return Alignment(np.maximum(detail, level).clip(0, 1), detail, level, forward, box)


def _level(thumbs: NDArray[np.uint8], pairs: NDArray[np.int64]) -> Array:
    cells = thumbs.reshape(-1, 32, 2, 32, 2, 3).mean(axis=(2, 4, 5), dtype=np.float32)
    found = np.empty(len(pairs), np.float32)
    for at in range(0, len(pairs), BATCH):
        first, second = cells[pairs[at : at + BATCH].T]
        apart = first - second
        spread = np.minimum(first.std(axis=(1, 2)), second.std(axis=(1, 2)))
        alike = 1 - (np.sqrt((apart * apart).mean(axis=(1, 2))) + 0.5) / (spread + 0.5)
        grain = _correlation(_high(first, 5), _high(second, 5), 1e-4)
        agree = np.maximum(alike / 0.8, grain / 0.25).clip(0, 1)
        found[at : at + BATCH] = (1 - np.abs(apart).max(axis=(1, 2)) / 40).clip(0) * agree
    return found


def _promising(grey: Array, inner: Rows, outer: Rows) -> tuple[Rows, Array]:
    """Pairs in which the inner picture may lie in the outer one, and the likeliest box of each."""
    coarse, crop = _coarse(grey, inner, outer)
    best = np.full(len(inner), WORTH_FINE, np.float32)
    box = np.zeros((len(inner), 4), np.float32)
    for choice in range(TRIED):
        rows = np.flatnonzero(coarse[:, choice] >= WORTH_COARSE)
        for part in _batches(rows):
            at = _refine(
                grey[inner[part]], grey[outer[part]], boxes()[crop[part, choice]], cells=16, rounds=6
            )
            slow = _slow(_shrink(grey[inner[part]], 16), _warp(grey[outer[part]], at, 16))
            better = slow > best[part]
            best[part[better]], box[part[better]] = slow[better], at[better]
    rows = np.flatnonzero(best > WORTH_FINE)
    return rows, box[rows]


def _finished(grey: Array, inner: Rows, outer: Rows, box: Array) -> tuple[Array, Array]:
    """Correlation of the detail of aligned pairs, and their final boxes."""
    detail = np.zeros(len(box), np.float32)
    box = box.copy()
    for rows in _batches(np.arange(len(box))):
        box[rows] = _refine(grey[inner[rows]], grey[outer[rows]], box[rows], cells=32, rounds=8)
        seen = _warp(grey[outer[rows]], box[rows], 32)
        detail[rows] = _detail(_shrink(grey[inner[rows]], 32), seen, box[rows])
    return detail, box


def _batches(rows: Rows) -> Iterator[Rows]:
    return (rows[at : at + BATCH] for at in range(0, len(rows), BATCH))


def _coarse(grey: Array, inner: Rows, outer: Rows) -> tuple[Array, Rows]:
    """[p, TRIED] best correlations of whole inner pictures with crops of the outer ones, and which crops."""
    used, place = np.unique(inner, return_inverse=True)
    whole = _normal(_sample_whole(grey[used]))
    scores = np.zeros((len(inner), TRIED), np.float32)
    crops = np.zeros((len(inner), TRIED), np.int64)
    order = np.argsort(outer, kind="stable")
    pictures, starts = np.unique(outer[order], return_index=True)
    for picture, rows in zip(pictures, np.split(order, starts[1:]), strict=True):
        every = whole[place[rows]] @ _crop_vectors(grey[picture]).T
        crops[rows] = np.argsort(-every, axis=1, kind="stable")[:, :TRIED]
        scores[rows] = np.take_along_axis(every, crops[rows], axis=1)
    return scores, crops


def _crop_vectors(outer: Array) -> Array:
    """[crops, 144] normalised coarse luma of every crop in `boxes()` of one [64, 64] picture."""
    matrix, columns, rows = _crop_sampling()
    sampled = (matrix @ outer @ matrix.T).reshape(-1, COARSE, matrix.shape[0] // COARSE, COARSE)
    return _normal(sampled[rows, :, columns, :].reshape(len(rows), -1))


@cache
def _intervals() -> Array:
    """[m, 2] start and length of the stretches of an axis that a crop may take."""
    found = []
    for scale in SCALES:
        steps = int(np.ceil((1 - scale) / 0.08 - 1e-9)) if scale < 1 else 0
        found += [(start, scale) for start in np.linspace(0, 1 - scale, steps + 1)]
    return np.array(found, dtype=np.float32)


@cache
def boxes() -> Array:
    """[crops, 4] x0, width, y0, height of the coarse crops."""
    _, columns, rows = _crop_sampling()
    intervals = _intervals()
    return np.concatenate([intervals[columns], intervals[rows]], axis=1)


@cache
def _crop_sampling() -> tuple[Array, NDArray[np.int64], NDArray[np.int64]]:
    intervals = _intervals()
    matrix = _box_weights(intervals[:, 0], intervals[:, 1], COARSE).reshape(-1, THUMB)
    apart = np.abs(np.log(intervals[:, None, 1] / intervals[None, :, 1]))
    columns, rows = np.nonzero(apart <= STRETCH)
    return matrix, columns, rows


def _box_weights(start: Array, length: Array, cells: int) -> Array:
    """[n, cells, 64] weights that average a 64-pixel axis over equal cells of [start, start + length].

    What lies outside the picture takes the value of its edge.
    """
    edges = (start[:, None] + length[:, None] * np.linspace(0, 1, cells + 1, dtype=np.float32)) * THUMB
    low, high = edges[:, :-1, None], edges[:, 1:, None]
    pixel = np.arange(THUMB, dtype=np.float32)
    left = np.where(pixel == 0, -np.float32(1e6), pixel)
    right = np.where(pixel == THUMB - 1, np.float32(1e6), pixel + 1)
    shared = np.minimum(high, right) - np.maximum(low, left)
    return shared.clip(min=0) / (high - low)


def _sample_whole(pictures: Array) -> Array:
    weights = _box_weights(np.zeros(1, np.float32), np.ones(1, np.float32), COARSE)[0]
    return (weights @ pictures @ weights.T).reshape(len(pictures), -1)


def _normal(vectors: Array) -> Array:
    """Remove mean and slope (a plane) from [n, cells * cells], and bring to length 1; blank ones become 0."""
    plane = _plane(round(vectors.shape[1] ** 0.5))
    rest = vectors - (vectors @ plane) @ plane.T
    size = np.sqrt((rest * rest).sum(axis=1, keepdims=True))
    return rest / np.maximum(size, 0.5 * vectors.shape[1] ** 0.5)


@cache
def _plane(cells: int) -> Array:
    """[cells * cells, 3] orthonormal: constant, slope across, slope down."""
    ramp = np.linspace(-1, 1, cells)
    basis = np.stack([np.ones((cells, cells)), np.tile(ramp, (cells, 1)), np.tile(ramp[:, None], (1, cells))])
    basis = basis.reshape(3, -1)
    return (basis / np.linalg.norm(basis, axis=1, keepdims=True)).T.astype(np.float32)


def _refine(inner: Array, outer: Array, box: Array, *, cells: int, rounds: int) -> Array:
    """Move and resize [n, 4] boxes in `outer` to show what `inner` shows ([n, 64, 64] luma each)."""
    target = _shrink(inner, cells)
    target = _normal(target.reshape(len(target), -1)).reshape(-1, cells, cells)
    middle = (np.arange(cells, dtype=np.float32) + 0.5) / cells
    box = box.copy()
    for _ in range(rounds):
        seen = _warp(outer, box, cells)
        seen = _normal(seen.reshape(len(seen), -1)).reshape(-1, cells, cells)
        slope = (seen + target) / 2
        across = np.gradient(slope, axis=2) * cells / box[:, 1, None, None]
        down = np.gradient(slope, axis=1) * cells / box[:, 3, None, None]
        change = np.stack([across, across * middle, down, down * middle[:, None]], axis=1)
        change = change.reshape(len(box), 4, -1)
        error = (target - seen).reshape(len(box), -1, 1)
        normal = change @ change.transpose(0, 2, 1)
        normal += (
            1e-3 * np.eye(4, dtype=np.float32) * (np.trace(normal, axis1=1, axis2=2) + 1e-6)[:, None, None]
        )
        move = np.linalg.solve(normal, change @ error)[..., 0]
        box += move.clip(-0.06, 0.06)
        box[:, 1::2] = box[:, 1::2].clip(0.6, 1.04)
        box[:, 0::2] = box[:, 0::2].clip(-0.03, 1.03 - box[:, 1::2])
    return box


def _warp(outer: Array, box: Array, cells: int) -> Array:
    """[n, cells, cells] means of [n, 64, 64] pictures over the cells of their boxes."""
    across = _box_weights(box[:, 0], box[:, 1], cells)
    down = _box_weights(box[:, 2], box[:, 3], cells)
    return down @ outer @ across.transpose(0, 2, 1)


def _shrink(pictures: Array, cells: int) -> Array:
    step = THUMB // cells
    return pictures.reshape(-1, cells, step, cells, step).mean(axis=(2, 4))


def _slow(first: Array, second: Array) -> Array:
    """Correlation of [n, cells, cells] pairs with only mean and slope removed."""
    return (_normal(first.reshape(len(first), -1)) * _normal(second.reshape(len(second), -1))).sum(axis=1)


def _detail(first: Array, second: Array, box: Array) -> Array:
    """Correlation of the detail of [n, 32, 32] pairs; less where a move is vouched for by little of the area.

    A single edge can be laid over any other by moving and resizing. So a pair that had to be moved counts
    fully only if detail above the noise covers a fifth of the area; otherwise as the root of that share.
    """
    one, other = _local(_high(first, 3)), _local(_high(second, 3))
    covered = np.minimum((one * one).mean(axis=(1, 2)), (other * other).mean(axis=(1, 2)))
    moved = np.abs(box - np.array([0, 1, 0, 1], np.float32)).max(axis=1) > UNMOVED
    vouched = np.where(moved, np.sqrt(covered / COVERED).clip(0, 1), np.float32(1))
    return _correlation(one, other, 0.04) * vouched


def _high(pictures: Array, side: int) -> Array:
    """[n, h - side + 1, w - side + 1]: what differs from the mean of the neighbourhood, `side` cells wide."""
    edge = side // 2
    return pictures[:, edge:-edge, edge:-edge] - _box_means(pictures, side)


def _local(high: Array) -> Array:
    """Detail relative to its local spread and the noise floor."""
    around = np.pad(high * high, ((0, 0), (1, 1), (1, 1)), mode="edge")
    return high / np.sqrt(_box_means(around, 3).clip(min=0) + np.float32(NOISE**2))


def _box_means(pictures: Array, side: int) -> Array:
    """[n, h - side + 1, w - side + 1] means over squares."""
    height, width = pictures.shape[1] - side + 1, pictures.shape[2] - side + 1
    rows = np.zeros_like(pictures[:, :height])
    for at in range(side):
        rows += pictures[:, at : at + height]
    means = np.zeros_like(rows[:, :, :width])
    for at in range(side):
        means += rows[:, :, at : at + width]
    return means / np.float32(side * side)


def _correlation(first: Array, second: Array, floor: float) -> Array:
    """Of n pairs; powers under `floor` count as `floor`, so that nothing does not correlate with nothing."""
    shared = (first * second).mean(axis=(1, 2))
    powers = (first * first).mean(axis=(1, 2)) * (second * second).mean(axis=(1, 2))
    return shared / np.sqrt(np.maximum(powers, np.float32(floor * floor)))
