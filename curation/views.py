"""Other ways to see a picture, in which a copy of it may lie: mirrored, turned by quarters, or only a part.

| view    | what                                                                        | finds            |
|---------|-----------------------------------------------------------------------------|------------------|
| 0       | the picture                                                                 | most copies      |
| 1 to 7  | mirrored if odd; then turned by a quarter (2, 3), two (4, 5), or three (6, 7) | mirrored, turned |
| 8 to 15 | left, right, upper and lower half, and the quarters                         | collages         |

In a pair the view is one of its second picture; with OF_FIRST added, of its first. All are made of what
ingest left: a turned thumbnail is the thumbnail of the turned picture, and hashes and raw descriptors of
views follow from those numbers by exchanging places and signs.

WINDOWS are no views: they only propose. What is like a window of a picture may be a crop of it, and the
alignment looks for crops in view 0 by itself.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from curation.descriptor import Whitening, describe, order_of
from curation.ingest import Stack
from curation.looks import THUMB, hashes_of_waves, luma, waves

Rows = NDArray[np.int64]
Hashes = NDArray[np.uint64]

TURNS = range(1, 8)
TILES = range(8, 16)
OF_FIRST = 16
UNDONE = (0, 1, 6, 3, 4, 5, 2, 7)  # by which turn each turn is
PAIRED = (1, 2, 3, 4, 5, 7)  # turns that find all pairs of one set: a quarter to one side finds the other
AT_ONCE = 256  # pictures
WINDOWS = ((0.0, 0.0), (0.2, 0.0), (0.0, 0.2), (0.2, 0.2), (0.1, 0.1))  # left and top, as shares
WINDOW = 0.8  # side: between those of crops to half of the area and to nine tenths

_HALF = THUMB // 2
_SPANS = (slice(0, THUMB), slice(0, _HALF), slice(_HALF, THUMB))  # of an axis: all, first half, second half
_TILES = ((0, 1), (0, 2), (1, 0), (2, 0), (1, 1), (1, 2), (2, 1), (2, 2))  # spans down and across


def seen(thumbs: NDArray[np.uint8], view: int) -> NDArray[np.uint8]:
    """[n, 64, 64, 3] thumbnails in this view."""
    if view in TILES:
        down, across = _TILES[view - TILES.start]
        part = thumbs[:, _SPANS[down], _SPANS[across]]
        return part.repeat(THUMB // part.shape[1], axis=1).repeat(THUMB // part.shape[2], axis=2)
    return np.rot90(thumbs[:, :, ::-1] if view % 2 else thumbs, view // 2, axes=(1, 2))


def hashes(thumbs: NDArray[np.uint8], views: Sequence[int]) -> tuple[Hashes, Hashes, NDArray[np.float32]]:
    """[views, n] perceptual hash, PCA hash and spread of the luma of thumbnails in each of these views."""
    found = np.empty((2, len(views), len(thumbs)), np.uint64)
    spread = np.empty(found.shape[1:], np.float32)
    whole = np.repeat(waves(), 2, axis=1) / 2  # of 64 numbers, that are averaged in pairs
    axis = np.zeros((3, len(whole), THUMB), np.float32)
    axis[0], axis[1, :, :_HALF], axis[2, :, _HALF:] = whole, waves(), waves()
    axis = axis.reshape(-1, THUMB)
    for at in range(0, len(thumbs), AT_ONCE):
        part = slice(at, at + AT_ONCE)
        both = (axis @ luma(thumbs[part]) @ axis.T).reshape(-1, 3, len(whole), 3, len(whole))
        for number, view in enumerate(views):
            down, across = _TILES[view - TILES.start] if view in TILES else (0, 0)
            low = both[:, down, :, across]
            found[:, number, part] = hashes_of_waves(_turned_waves(low, view))
            power = (low * low).sum(axis=(1, 2)) - low[:, 0, 0] ** 2
            spread[number, part] = np.sqrt(power.clip(0)) / _HALF  # orthonormal patterns of 32 x 32 cells
    return found[0], found[1], spread


def _turned_waves(found: NDArray[np.floating], view: int) -> NDArray[np.floating]:
    """Frequencies of turned pictures: a mirror changes the sign of odd ones, a quarter exchanges axes."""
    if view not in TURNS:
        return found
    sign = np.where(np.arange(found.shape[1]) % 2, np.float32(-1), np.float32(1))
    if view % 2:
        found = found * sign
    for _ in range(view // 2):  # numpy.rot90: what was across runs upwards
        found = found.transpose(0, 2, 1) * sign[:, None]
    return found


class Turned:
    """Embeddings of pictures in one of the TURNS, by the built-in descriptor, made as they are read."""

    def __init__(self, raw: Stack, whitening: Whitening, view: int) -> None:
        self._raw, self._whitening = raw, whitening
        self._order = order_of(view // 2, bool(view % 2))
        self.shape = (len(raw), whitening.matrix.shape[1])

    def __len__(self) -> int:
        return len(self._raw)

    def __getitem__(self, rows: Rows, /) -> NDArray[np.float16]:
        raw = self._raw.rows(rows)[:, self._order].astype(np.float32)
        return self._whitening(raw).astype(np.float16)


class Cropped:
    """Embeddings of one of the WINDOWS of pictures, by the built-in descriptor, made as they are read."""

    def __init__(self, thumbs: Stack, whitening: Whitening, window: int) -> None:
        self._thumbs, self._whitening = thumbs, whitening
        left, top = WINDOWS[window]
        self._box = THUMB * left, THUMB * top, THUMB * (left + WINDOW), THUMB * (top + WINDOW)
        self.shape = (len(thumbs), whitening.matrix.shape[1])

    def __len__(self) -> int:
        return len(self._thumbs)

    def __getitem__(self, rows: Rows, /) -> NDArray[np.float16]:
        raw = np.zeros((len(rows), len(self._whitening.mean)), np.float32)
        for at, thumb in enumerate(self._thumbs.rows(rows)):
            image = Image.fromarray(thumb)
            raw[at] = describe(np.asarray(image.resize(image.size, Image.Resampling.BICUBIC, self._box)))
        return self._whitening(raw).astype(np.float16)
