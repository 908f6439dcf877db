"""A second, independent look at a candidate pair: can one picture be laid over the other?

Embeddings and hashes say that two pictures are alike; two windows on one meadow, or two shirts laid out
on one table, are alike too. Here one thumbnail is laid over the other as a whole or as a crop of it, with
the luma's gain and offset left free, and what remains decides. Three steps, each on fewer pairs:

1. coarse: the 8 x 8 luma of one picture against some 60 crops of the other (normalised correlation), and
   where one is alike, against some 260;
2. fine: from the best crop, Gauss-Newton on position and size of the crop, each axis by itself, at 16 x 16
   and, where the detail begins to agree, further and at 32 x 32 (Lucas and Kanade 1981; Baker and Matthews
   2004);
3. score: the correlation of the detail. Detail is what differs from the mean of the 3 x 3 neighbourhood,
   divided by its local spread plus a noise floor. So slow changes (sky, shading) count for nothing, a strong
   outline counts no more than the faint fabric inside it, and grain below the noise floor counts for
   little.

A picture without detail, such as clear sky, can be told from its like by its levels only: such pairs
count if, with nothing moved or fitted, no cell differs much and even the grain agrees a little.

Everything is batched numpy on one thread, so that results do not depend on the number of processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from curation.crops import FEW, MANY, WHOLE, Array, Crops, Rows, halved, refine, warp, whole_vectors
from curation.looks import luma

WORTH_MANY = 0.6  # correlation with one of the few crops from which the many are tried
WORTH_COARSE = 0.73  # coarse correlation from which a crop is refined
FINE = ((2, 0.3), (4, 0.4))  # rounds at 16 x 16, and correlation of the detail there from which it goes on
FINEST = ((2, 0.4), (6, 0.0))  # likewise at 32 x 32
NOISE = 1.5  # levels (of 255) of noise in a cell of a 32 x 32 thumbnail, from compression and resampling
UNMOVED = 0.03  # boxes that differ from the whole by no more than this are no crops
COVERED = 0.2  # power of the detail, of at most 1, from which it vouches for a crop
BATCH = 512  # pairs at a time
EVENLY = np.full(3, 1 / 3, np.float32)  # weights of red, green and blue
PICTURES = 8  # whose crops are cut at a time: as much as the cache holds

Steps = tuple[tuple[int, float], ...]


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
    fine = luma(thumbs)
    middle = halved(fine)
    small = halved(middle)
    level = _level(thumbs, pairs)
    detail = np.zeros(len(pairs), np.float32)
    forward = np.ones(len(pairs), bool)
    box = np.tile(WHOLE, (len(pairs), 1))
    for ahead in (True, False):
        inner, outer = pairs.T if ahead else pairs.T[::-1]
        rows, at = _promising(middle, small, inner, outer)
        found, at, _ = _fitted(middle, fine, inner[rows], outer[rows], at, FINEST)
        better = found > detail[rows]
        rows = rows[better]
        detail[rows], box[rows], forward[rows] = found[better], at[better], ahead
    return Alignment(np.maximum(detail, level).clip(0, 1), detail, level, forward, box)


def _level(thumbs: NDArray[np.uint8], pairs: NDArray[np.int64]) -> Array:
    cells = halved(luma(thumbs, EVENLY))
    large = halved(halved(cells)).reshape(len(cells), -1)
    # Where the means of 4 x 4 cells differ so much, one of these does.
    close = [
        np.abs(np.subtract(*large[pairs[rows].T])).max(axis=1) < 40
        for rows in in_batches(np.arange(len(pairs)))
    ]
    found = np.zeros(len(pairs), np.float32)
    for rows in in_batches(np.flatnonzero(np.concatenate([np.zeros(0, bool), *close]))):
        first, second = cells[pairs[rows].T]
        apart = first - second
        spread = np.minimum(first.std(axis=(1, 2)), second.std(axis=(1, 2)))
        alike = 1 - (np.sqrt((apart * apart).mean(axis=(1, 2))) + 0.5) / (spread + 0.5)
        grain = _correlation(high(first, 5), high(second, 5), 1e-4)
        agree = np.maximum(alike / 0.8, grain / 0.25).clip(0, 1)
        found[rows] = (1 - np.abs(apart).max(axis=(1, 2)) / 40).clip(0) * agree
    return found


def _promising(middle: Array, small: Array, inner: Rows, outer: Rows) -> tuple[Rows, Array]:
    """Pairs in which the inner picture may lie in the outer one, and the likeliest box of each."""
    rows, box = _coarse(small, inner, outer)
    _, box, stays = _fitted(small, middle, inner[rows], outer[rows], box, FINE)
    return rows[stays], box[stays]


def _fitted(
    targets: Array, pictures: Array, inner: Rows, outer: Rows, box: Array, steps: Steps
) -> tuple[Array, Array, Rows]:
    """Correlation of the detail of pairs and their boxes, as far as each went; and who passed every step."""
    detail, box = np.zeros(len(box), np.float32), box.copy()
    stays = np.arange(len(box))
    for rounds, least in steps:
        for rows in in_batches(stays):
            detail[rows], box[rows] = moved(
                targets[inner[rows]], pictures[outer[rows]], box[rows], rounds=rounds
            )
        stays = stays[detail[stays] >= least]
    return detail, box, stays


def moved(target: Array, outer: Array, box: Array, *, rounds: int) -> tuple[Array, Array]:
    """[n] correlation of the detail after some rounds of `refine`, and the boxes then."""
    box = refine(target, outer, box, rounds=rounds)
    return detail_of(target, warp(outer, box, target.shape[1]), box), box


def _coarse(small: Array, inner: Rows, outer: Rows) -> tuple[Rows, Array]:
    """Pairs of which one of a FEW crops is alike, or then of the MANY; and the likeliest crop's box."""
    score, crop = best_crops(FEW, small, inner, outer)
    rows = np.flatnonzero(score >= WORTH_MANY)
    score, box = score[rows], FEW.boxes[crop[rows]]
    closer, crop = best_crops(MANY, small, inner[rows], outer[rows])
    better = closer > score
    score[better], box[better] = closer[better], MANY.boxes[crop[better]]
    stays = score >= WORTH_COARSE
    return rows[stays], box[stays]


def best_crops(crops: Crops, small: Array, inner: Rows, outer: Rows) -> tuple[Array, Rows]:
    """[p] best correlations of whole inner pictures with crops of the outer ones, and which crops.

    Args:
        small: [n, 16, 16].
        inner, outer: [p] rows of these.
    """
    whole = whole_vectors(small)
    score, found = np.zeros(len(inner), np.float32), np.zeros(len(inner), np.int64)
    order = np.argsort(outer, kind="stable")
    pictures, starts, counts = np.unique(outer[order], return_index=True, return_counts=True)
    few_first = np.argsort(counts, kind="stable")  # so that those at a time are in about as many pairs
    for at in range(0, len(few_first), PICTURES):
        mine = few_first[at : at + PICTURES]
        place = np.arange(counts[mine].max())
        there = place < counts[mine, None]
        rows = order[starts[mine, None] + np.where(there, place, 0)]
        every = crops.correlations(small[pictures[mine]], whole[inner[rows]])
        score[rows[there]], found[rows[there]] = every.max(axis=2)[there], every.argmax(axis=2)[there]
    return score, found


def in_batches(rows: Rows) -> Iterator[Rows]:
    return (rows[at : at + BATCH] for at in range(0, len(rows), BATCH))


def detail_of(first: Array, second: Array, box: Array) -> Array:
    """Correlation of the detail of [n, 32, 32] pairs; less where a move is vouched for by little of the area.

    A single edge can be laid over any other by moving and resizing. So a pair that had to be moved counts
    fully only if detail above the noise covers a fifth of the area; otherwise as the root of that share.
    """
    one, other = _local(high(first, 3)), _local(high(second, 3))
    covered = np.minimum((one * one).mean(axis=(1, 2)), (other * other).mean(axis=(1, 2)))
    moved = np.abs(box - WHOLE).max(axis=1) > UNMOVED
    vouched = np.where(moved, np.sqrt(covered / COVERED).clip(0, 1), np.float32(1))
    return _correlation(one, other, 0.04) * vouched


def high(pictures: Array, side: int) -> Array:
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
