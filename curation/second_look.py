"""Pairs that are alike to the embedding but do not fit as they are: is one tilted, or recoloured?

Tilted: the middle of one picture is turned back by up to 14 degrees and looked for in the other, as a crop
of it (`curation.align`). The angle is found in three steps, each finer and on fewer pairs: 4 degrees apart at
8 x 8, 2 at 16 x 16, 1 at 32 x 32.

Recoloured: where hues were exchanged, the luma of a copy is no function of the luma of its original, but it
may still be a mixture of its colours. The mixture whose detail comes nearest is fitted (least squares, three
weights for 196 cells, then for 900), and takes the place of the luma.
"""

import numpy as np
from numpy.typing import NDArray

from curation.align import best_crops, detail_of, high, in_batches, moved
from curation.crops import FEW, MANY, WHOLE, Array, Crops, Rows, halved
from curation.looks import LUMA, luma

ANGLES = np.array([-12, -8, -4, 4, 8, 12], np.float32)  # degrees
WORTH_MANY = 0.75  # correlation at 8 x 8 with one of a few crops from which the many are tried at all angles
WORTH_TURNING = 0.8  # correlation at 8 x 8 and the best angle, from which it is looked for finely
WORTH_FINE = 0.45  # correlation of the detail at 16 x 16, from which it is looked for at 32 x 32
EARLY, LATE = 3, 5  # rounds of moving a box at three angles, and more at the best of them
WORTH_ROUNDS = 0.25  # correlation of the detail after the early rounds, from which the late ones follow
WORTH_MIXING = 0.3  # that of a mixture of colours at 16 x 16, from which one is looked for at 32 x 32
RIDGE = 0.05  # of the power of the colours' detail, so that nearly grey pictures get no wild weights


def look_again(thumbs: NDArray[np.uint8], pairs: Rows, tall: Array) -> Array:
    """[p] correlation of the detail of the pairs, tilted or recoloured as it is largest.

    Args:
        thumbs: [n, 64, 64, 3].
        pairs: [p, 2] rows of `thumbs`.
        tall: [p] height over width of the second picture itself.
    """
    rows, place = np.unique(pairs, return_inverse=True)
    thumbs, pairs = thumbs[rows], place.reshape(pairs.shape)
    return np.maximum(_tilted(luma(thumbs), pairs, tall), _recoloured(thumbs, pairs))


def tilted(pictures: Array, degrees: Array, tall: Array) -> Array:
    """[n, size, size] the middle of lumas [n, size, size], turned: as much as stays inside at that angle."""
    size, angle = pictures.shape[1], np.deg2rad(degrees)
    cosine, sine = np.cos(angle), np.sin(angle)
    side = 1 / (cosine + np.abs(sine) * np.maximum(tall, 1 / tall))
    # A thumbnail is as wide as high: its units are those of the picture across, and `tall` times these down.
    matrix = np.stack([cosine, -sine * tall, sine / tall, cosine]) * side
    corner = size / 2 - (matrix[0::2] + matrix[1::2]) * (size / 2)
    across = np.arange(size, dtype=np.float32) + np.float32(0.5)
    x, y = (
        matrix[2 * axis, :, None, None] * across
        + matrix[2 * axis + 1, :, None, None] * across[:, None]
        + (corner[axis] - np.float32(0.5))[:, None, None]
        for axis in (0, 1)
    )
    left, top = (np.clip(each, 0, size - 2).astype(np.int64) for each in (x, y))
    right, low = ((each - whole.astype(np.float32)).clip(0, 1) for each, whole in ((x, left), (y, top)))
    flat, at = pictures.ravel(), top * size + left + (np.arange(len(pictures)) * size * size)[:, None, None]
    upper = flat[at] * (1 - right) + flat[at + 1] * right
    return upper * (1 - low) + (flat[at + size] * (1 - right) + flat[at + size + 1] * right) * low


def _tilted(fine: Array, pairs: Rows, tall: Array) -> Array:
    found = np.zeros(len(pairs), np.float32)
    for rows in in_batches(np.arange(len(pairs))):
        outer, inner = pairs[rows].T
        found[rows] = _tilted_batch(fine[outer], fine[inner], tall[rows])
    return found


def _tilted_batch(outer: Array, inner: Array, tall: Array) -> Array:
    small, beside = halved(inner), halved(halved(outer))
    score, _ = _at_all_angles(FEW, halved(small), beside, tall, halve=False)
    likely = np.flatnonzero(score.max(axis=0) >= WORTH_MANY)
    score, crop = _at_all_angles(MANY, small[likely], beside[likely], tall[likely], halve=True)
    best, at = score.argmax(axis=0), np.flatnonzero(score.max(axis=0) >= WORTH_TURNING)
    rows, angle, box = likely[at], ANGLES[best[at]], MANY.boxes[crop[best[at], at]]
    fit, angle, box = _turned_until_it_fits(halved(outer[rows]), small[rows], tall[rows], angle, box)
    stays = fit >= WORTH_FINE
    rows, angle, box = rows[stays], angle[stays], box[stays]
    fit, _, _ = _turned_until_it_fits(outer[rows], inner[rows], tall[rows], angle, box)
    result = np.zeros(len(outer), np.float32)
    result[rows] = fit
    return result


def _at_all_angles(
    crops: Crops, inner: Array, outer: Array, tall: Array, *, halve: bool
) -> tuple[Array, Rows]:
    """[angles, n] best correlations of turned pictures with crops of [n, 16, 16] others, and which crops."""
    every = np.concatenate([tilted(inner, np.full(len(inner), angle), tall) for angle in ANGLES])
    place = np.arange(len(every))
    both = np.concatenate([halved(every) if halve else every, outer])
    score, crop = best_crops(crops, both, place, len(every) + place % max(1, len(outer)))
    return score.reshape(len(ANGLES), -1), crop.reshape(len(ANGLES), -1)


def _turned_until_it_fits(
    outer: Array, inner: Array, tall: Array, angle: Array, box: Array
) -> tuple[Array, Array, Array]:
    """Detail in common, angle and box at the best of three angles: 2 degrees apart at 16 cells, 1 at 32."""
    if not len(angle):
        return np.zeros(0, np.float32), angle, box
    tries, cells = [], inner.shape[1] // 2
    for step in (-1, 0, 1):
        tried = angle + np.float32(step * 32 / cells)
        target = halved(tilted(inner, tried, tall))
        fit, at = moved(target, outer, box, rounds=EARLY)
        tries.append((fit, tried, at))
    fits, angles, found = (np.stack(each) for each in zip(*tries, strict=True))
    best, rows = fits.argmax(axis=0), np.arange(len(angle))
    fit, angle, box = fits[best, rows], angles[best, rows], found[best, rows]
    near = np.flatnonzero(fit >= WORTH_ROUNDS)
    target = halved(tilted(inner[near], angle[near], tall[near]))
    fit[near], box[near] = moved(target, outer[near], box[near], rounds=LATE)
    return fit, angle, box


def _recoloured(thumbs: NDArray[np.uint8], pairs: Rows) -> Array:
    colours = np.stack([halved(thumbs[..., colour].astype(np.float32)) for colour in range(3)], axis=1)
    small = halved(colours.reshape(-1, 32, 32)).reshape(-1, 3, 16, 16)
    found = np.zeros(len(pairs), np.float32)
    for one, other in (pairs.T, pairs.T[::-1]):
        for rows in in_batches(np.arange(len(pairs))):
            likely = rows[_mixed(small[one[rows]], small[other[rows]]) >= WORTH_MIXING]
            found[likely] = np.maximum(found[likely], _mixed(colours[one[likely]], colours[other[likely]]))
    return found


def _mixed(target: Array, colours: Array) -> Array:
    """[n] detail that the luma of [n, 3, side, side] targets shares with the nearest mixture of colours."""
    wanted, cells = np.tensordot(target, LUMA, (1, 0)), (target.shape[-1] - 2) ** 2
    detail = high(colours.reshape(-1, *colours.shape[2:]), 3).reshape(-1, 3, cells)
    goal = high(wanted, 3).reshape(-1, cells, 1)
    square = detail @ detail.transpose(0, 2, 1)
    power = np.trace(square, axis1=1, axis2=2)[:, None, None] / 3 + np.float32(1e-3)
    weights = np.linalg.solve(square + RIDGE * power * np.eye(3, dtype=np.float32), detail @ goal)[..., 0]
    mixed = np.einsum("nchw,nc->nhw", colours, weights)
    return detail_of(wanted, mixed, np.tile(WHOLE, (len(mixed), 1)))
