"""Pairs that are alike to the embedding but do not fit as they are: is one tilted, or recoloured?

Tilted: the middle of one picture is turned back by up to 14 degrees and looked for in the other, as a crop
of it (`curation.align`). The angle is found in three steps, each finer and on fewer pairs: 4 degrees apart at
12 x 12, 2 at 16 x 16, 1 at 32 x 32.

Recoloured: where hues were exchanged, the luma of a copy is no function of the luma of its original, but it
may still be a mixture of its colours. The mixture whose detail comes nearest is fitted (least squares, three
weights for 900 cells), and takes the place of the luma.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from curation.align import WORTH_FINE, coarse, detail_of, high, in_batches
from curation.crops import WHOLE, Array, Rows, boxes, correlation, halved, refine, warp
from curation.looks import LUMA, luma

ANGLES = np.array([-12, -8, -4, 4, 8, 12], np.float32)  # degrees
WORTH_TURNING = 0.85  # correlation at 12 x 12 and the best angle, from which it is looked for finely
CELLS = 30 * 30  # that have neighbours on all sides, of 32 x 32
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
    moves = np.stack([matrix[0], matrix[1], corner[0], matrix[2], matrix[3], corner[1]], axis=1)
    found = np.empty_like(pictures)
    for row, (picture, move) in enumerate(zip(pictures, moves.tolist(), strict=True)):
        image = Image.fromarray(picture)
        image = image.transform(image.size, Image.Transform.AFFINE, move, Image.Resampling.BILINEAR)
        found[row] = np.asarray(image)
    return found


def _tilted(fine: Array, pairs: Rows, tall: Array) -> Array:
    found = np.zeros(len(pairs), np.float32)
    for rows in in_batches(np.arange(len(pairs))):
        outer, inner = pairs[rows].T
        found[rows] = _tilted_batch(fine[outer], fine[inner], tall[rows])
    return found


def _tilted_batch(outer: Array, inner: Array, tall: Array) -> Array:
    count = len(outer)
    small = halved(inner)
    every = np.concatenate([tilted(small, np.full(count, angle), tall) for angle in ANGLES])
    place = np.arange(len(every))
    score, crop = coarse(np.concatenate([every, halved(outer)]), place, len(every) + place % count)
    score, crop = score[:, 0].reshape(-1, count), crop[:, 0].reshape(-1, count)
    best, rows = score.argmax(axis=0), np.flatnonzero(score.max(axis=0) >= WORTH_TURNING)
    angle, box = ANGLES[best[rows]], boxes()[crop[best[rows], rows]]
    fit, angle, box = _turned_until_it_fits(halved(outer[rows]), small[rows], tall[rows], angle, box)
    stays = fit > WORTH_FINE
    rows, angle, box = rows[stays], angle[stays], box[stays]
    fit, _, _ = _turned_until_it_fits(outer[rows], inner[rows], tall[rows], angle, box)
    result = np.zeros(count, np.float32)
    result[rows] = fit
    return result


def _turned_until_it_fits(
    outer: Array, inner: Array, tall: Array, angle: Array, box: Array
) -> tuple[Array, Array, Array]:
    """Correlation, angle and box at the best of three angles: 2 degrees apart at 16 cells, 1 at 32."""
    if not len(angle):
        return np.zeros(0, np.float32), angle, box
    tries, cells = [], inner.shape[1] // 2
    for step in (-1, 0, 1):
        tried = angle + np.float32(step * 32 / cells)
        target = halved(tilted(inner, tried, tall))
        at = refine(target, outer, box, rounds=8)
        seen = warp(outer, at, cells)
        fit = correlation(target, seen) if cells == 16 else detail_of(target, seen, at)
        tries.append((fit, tried, at))
    fits, angles, found = (np.stack(each) for each in zip(*tries, strict=True))
    best, rows = fits.argmax(axis=0), np.arange(len(angle))
    return fits[best, rows], angles[best, rows], found[best, rows]


def _recoloured(thumbs: NDArray[np.uint8], pairs: Rows) -> Array:
    colours = np.stack([halved(thumbs[..., colour].astype(np.float32)) for colour in range(3)], axis=1)
    found = np.zeros(len(pairs), np.float32)
    for rows in in_batches(np.arange(len(pairs))):
        for one, other in (pairs[rows].T, pairs[rows].T[::-1]):
            found[rows] = np.maximum(found[rows], _recoloured_batch(colours[one], colours[other]))
    return found


def _recoloured_batch(target: Array, colours: Array) -> Array:
    """[n] detail that the luma of [n, 3, 32, 32] targets shares with the nearest mixture of other colours."""
    wanted = np.tensordot(target, LUMA, (1, 0))
    detail = high(colours.reshape(-1, *colours.shape[2:]), 3).reshape(-1, 3, CELLS)
    goal = high(wanted, 3).reshape(-1, CELLS, 1)
    square = detail @ detail.transpose(0, 2, 1)
    power = np.trace(square, axis1=1, axis2=2)[:, None, None] / 3 + np.float32(1e-3)
    weights = np.linalg.solve(square + RIDGE * power * np.eye(3, dtype=np.float32), detail @ goal)[..., 0]
    mixed = np.einsum("nchw,nc->nhw", colours, weights)
    return detail_of(wanted, mixed, np.tile(WHOLE, (len(mixed), 1)))
