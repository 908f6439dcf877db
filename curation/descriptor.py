"""The built-in descriptor: a picture embedding that needs no weights, where no backbone is at hand.

It is made of a 64 x 64 thumbnail, in four groups; each is brought to unit length, so that none drowns the
others:

| group   | what                                                                | numbers | survives     |
|---------|---------------------------------------------------------------------|---------|--------------|
| luma    | 8 x 8 means of the luma, mean and spread removed                    |      64 | recolouring  |
| colour  | 4 x 4 means of two opponent colours (red-green, yellow-blue)        |      32 | grain, blur  |
| palette | soft histogram of luma and opponent colours, 4 x 5 x 5, square root |     100 | cropping     |
| edges   | 8 orientations of the luma gradient at scales 1, 1/2 and 1/4, on a  |     312 | recolouring, |
|         | 4 x 4, 4 x 4 and 2 x 2 grid and over the whole, square root         |         | small shifts |

`Whitening`, fitted on the pool, first evens out what copies change (learnt from synthetic copies of the
pool's own pictures), so that directions in which a crop or another light moves a picture weigh less; it
then rotates to principal components, evens out their variances, and normalises to length 1. (Whitening
for retrieval: Jégou and Chum 2012; learnt from pairs: Mikolajczyk and Matas 2007; orientation histograms:
Dalal and Triggs 2005.)
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from curation.looks import luma

LENGTH = 64 + 32 + 100 + 312
ORIENTATIONS = 8
EDGE_GRIDS = (4, 4, 2)  # cells of a side at each scale
_ANGLES = np.arange(ORIENTATIONS) * np.pi / ORIENTATIONS
_COSINES, _SINES = (wave(_ANGLES).astype(np.float32)[:, None, None] for wave in (np.cos, np.sin))


def describe(thumb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[508] raw descriptor of one [64, 64, 3] thumbnail."""
    rgb = thumb.astype(np.float32)
    grey = luma(thumb)
    red_green = rgb[..., 0] - rgb[..., 1]
    yellow_blue = (rgb[..., 0] + rgb[..., 1]) / 2 - rgb[..., 2]
    opponent = np.stack([red_green, yellow_blue])
    grid = _pool(grey, 8)
    groups = [
        _unit(grid - grid.mean(), 20.0),
        _unit(_pool(opponent, 4), 20.0),
        _unit(_palette(grey, red_green, yellow_blue), 0.0),
        _unit(_edges(grey), 0.1),
    ]
    return np.concatenate(groups)


@cache
def order_of(quarters: int, mirrored: bool) -> NDArray[np.int64]:
    """[508] where the numbers of a mirrored, then turned picture are in the picture's own descriptor.

    Turned as by `numpy.rot90`. Directions of edges count modulo half a turn; a mirror exchanges their bins.
    """
    bins = (np.arange(ORIENTATIONS) - ORIENTATIONS // 2 * (quarters % 2)) % ORIENTATIONS
    bins = -bins % ORIENTATIONS if mirrored else bins
    taken, places = 0, []

    def planes(count: int, cells: int) -> NDArray[np.int64]:
        nonlocal taken
        at = taken + np.arange(count * cells * cells).reshape(count, cells, cells)
        taken += at.size
        return np.rot90(at[..., ::-1] if mirrored else at, quarters, axes=(1, 2))

    places += [planes(1, 8), planes(2, 4), planes(100, 1)]
    for cells in EDGE_GRIDS:
        places += [planes(ORIENTATIONS, cells)[bins], planes(ORIENTATIONS, 1)[bins]]
    return np.concatenate([place.ravel() for place in places])


@dataclass(frozen=True)
class Whitening:
    """A linear map from raw descriptors to embeddings, fitted on a pool."""

    mean: NDArray[np.float32]  # [raw]
    matrix: NDArray[np.float32]  # [raw, dim]

    @classmethod
    def fit(cls, raw: NDArray[np.float32], changes: NDArray[np.float32], dimension: int) -> "Whitening":
        """Fit to [n, raw] descriptors, of which copies differ by [m, raw] changes.

        Small variances are raised by a tenth of their mean, so that noise is not blown up.
        """
        mean = raw.mean(axis=0, dtype=np.float64)
        inner = _even(changes.T.astype(np.float64) @ changes / len(changes), len(mean))
        centred = (raw - mean) @ inner
        outer = _even(centred.T @ centred / max(1, len(raw) - 1), dimension)
        return cls(mean.astype(np.float32), (inner @ outer).astype(np.float32))

    def __call__(self, raw: NDArray[np.float32]) -> NDArray[np.float32]:
        """[n, dim] of length 1."""
        white = (raw - self.mean) @ self.matrix
        return white / np.linalg.norm(white, axis=1, keepdims=True).clip(min=1e-6)


def _even(covariance: NDArray[np.float64], dimension: int) -> NDArray[np.float64]:
    """[raw, dim] onto the principal axes, largest first, each divided by its spread."""
    variance, axes = np.linalg.eigh(covariance)
    variance, axes = variance[::-1], axes[:, ::-1]
    signs = np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    spread = np.sqrt(variance.clip(min=0.0) + 0.1 * variance.mean() + 1e-12)
    return (axes * signs / spread)[:, :dimension]


def _edges(grey: NDArray[np.floating]) -> NDArray[np.floating]:
    parts = []
    for cells in EDGE_GRIDS:
        across = (grey[1:-1, 2:] - grey[1:-1, :-2]) / 2
        down = (grey[2:, 1:-1] - grey[:-2, 1:-1]) / 2
        along = _COSINES * across + _SINES * down
        along *= along
        along *= along
        # The fourth power of the cosine makes the eight responses narrow, and smooth in the angle.
        strength = along / (np.hypot(across, down) ** 3 + np.float32(1e-3))
        pooled = np.sqrt(_pool(np.pad(strength, ((0, 0), (1, 1), (1, 1))), cells))
        whole = np.sqrt(strength.mean(axis=(1, 2)))
        parts += [_unit(pooled, 1.0), _unit(whole, 1.0)]
        half = grey.shape[0] // 2
        grey = grey.reshape(half, 2, half, 2).mean(axis=(1, 3))
    return np.concatenate(parts)


def _palette(*planes: NDArray[np.floating]) -> NDArray[np.floating]:
    shares = []
    for plane, bins, low, high in zip(planes, (4, 5, 5), (0, -64, -64), (255, 64, 64), strict=True):
        place = ((plane.ravel() - low) / (high - low)).clip(0, 1) * (bins - 1)
        shares.append((1 - np.abs(place - np.arange(bins, dtype=np.float32)[:, None])).clip(min=0))
    pairs = (shares[0][:, None] * shares[1]).reshape(-1, planes[0].size)
    return np.sqrt((pairs @ shares[2].T).ravel() / planes[0].size)


def _pool(planes: NDArray[np.floating], cells: int) -> NDArray[np.floating]:
    size = planes.shape[-1] // cells
    return planes.reshape(*planes.shape[:-2], cells, size, cells, size).mean(axis=(-3, -1))


def _unit(values: NDArray[np.floating], floor: float) -> NDArray[np.floating]:
    flat = values.ravel()
    return flat / np.float32(np.sqrt(flat @ flat + floor**2) + 1e-6)
