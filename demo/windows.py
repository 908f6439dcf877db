"""Where windows are cut from a photograph: places, scales and turns under the demo's rules.

Two windows share at most a tenth of the smaller one's area (so that none contains another), and test windows
come from tiles that no training window comes near.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from demo.geometry import Box, Window, overlap, touches

MOST_SHARED = 0.095  # the rule says a tenth; the rest is room for rounding in whoever checks it
TILE = 148  # pixels; a photograph is cut into tiles of about this size, and some of them are for testing
GAP = 4  # pixels between a test tile and the nearest training window
PER_TILE = {2: 2, 3: 5, 4: 8, 5: 7}  # windows along a tile's side: how often
PER_TEST_TILE = {3: 1, 4: 2, 5: 2}
LEAST_CELL = 34.0  # pixels; in less there is nothing to recognise
TURN = 25.0  # degrees, either way
TRIES = 60  # for each cell
LEAST_DETAIL = 7.0  # of 255; less is sky, a wall, the night
LEAST_IN_QUARTER = 2.5  # in three of a window's quarters: an edge against nothing looks like any other


@dataclass(frozen=True)
class Placed:
    """The windows of one photograph, and the tiles that the test windows were cut from."""

    training: list[Window]
    test: list[Window]
    tiles: list[Box]


def place(photograph: Image.Image, rng: random.Random, *, most_training: int, most_test: int) -> Placed:
    """Fill a photograph with windows, at most so many of each kind."""
    whole = Box(0, 0, *photograph.size)
    detail = _Detail(photograph)
    test_tiles, training_tiles = _tiles(whole, detail, rng)
    guarded = [tile.grown(GAP) for tile in test_tiles]

    def for_training(window: Window) -> bool:
        return whole.holds(window.corners) and not any(touches(window, tile) for tile in guarded)

    def for_testing(window: Window) -> bool:
        return any(tile.holds(window.corners) for tile in test_tiles)

    training = _fill(training_tiles, PER_TILE, for_training, detail, rng, most_training)
    return Placed(training, _fill(test_tiles, PER_TEST_TILE, for_testing, detail, rng, most_test), test_tiles)


def _tiles(whole: Box, detail: "_Detail", rng: random.Random) -> tuple[list[Box], list[Box]]:
    """A grid of tiles; of every four in reading order, one of the two with most to see is for testing."""
    columns, rows = max(3, round(whole.right / TILE)), max(2, round(whole.bottom / TILE))
    wide, high = whole.right / columns, whole.bottom / rows
    tiles = [
        Box(c * wide, r * high, (c + 1) * wide, (r + 1) * high) for r in range(rows) for c in range(columns)
    ]
    fours = [tiles[first : first + 4] for first in range(0, len(tiles) - 1, 4)]
    test = [rng.choice(sorted(four, key=lambda tile: -detail(_inside(tile)))[:2]) for four in fours]
    return test, [tile for tile in tiles if tile not in test]


def _inside(tile: Box) -> Window:
    side = min(tile.right - tile.left, tile.bottom - tile.top)
    return Window((tile.left + tile.right) / 2, (tile.top + tile.bottom) / 2, side, 0.0)


def _fill(
    tiles: list[Box],
    per_tile: dict[int, int],
    allowed: Callable[[Window], bool],
    detail: "_Detail",
    rng: random.Random,
    most: int,
) -> list[Window]:
    """One window in each cell of each tile where the rules leave room, in random order."""
    cells = [cell for tile in tiles for cell in _cells(tile, per_tile, rng)]
    rng.shuffle(cells)
    kept: list[Window] = []
    for cell in cells:
        tries = TRIES if len(kept) < most and detail(_inside(cell)) >= LEAST_DETAIL / 2 else 0
        near = [other for other in kept if touches(other, cell.grown(cell.right - cell.left))]
        for window in (_drawn(cell, rng) for _ in range(tries)):
            apart = all(overlap(window, other) <= MOST_SHARED for other in near)
            if apart and allowed(window) and detail(window) >= LEAST_DETAIL:
                kept.append(window)
                break
    return kept


def _cells(tile: Box, per_tile: dict[int, int], rng: random.Random) -> list[Box]:
    (count,) = rng.choices(list(per_tile), list(per_tile.values()))
    wide, high = tile.right - tile.left, tile.bottom - tile.top
    count = max(1, min(count, int(min(wide, high) / LEAST_CELL)))
    wide, high = wide / count, high / count
    corners = [
        (tile.left + column * wide, tile.top + row * high) for row in range(count) for column in range(count)
    ]
    return [Box(x, y, x + wide, y + high) for x, y in corners]


def _drawn(cell: Box, rng: random.Random) -> Window:
    wide, high = cell.right - cell.left, cell.bottom - cell.top
    x = rng.uniform(cell.left + 0.4 * wide, cell.right - 0.4 * wide)
    y = rng.uniform(cell.top + 0.4 * high, cell.bottom - 0.4 * high)
    return Window(x, y, min(wide, high) * rng.uniform(0.85, 1.1), rng.uniform(-TURN, TURN))


class _Detail:
    """How much there is to see in a window: the spread of its brightness, without an even slope."""

    GRID = 16

    def __init__(self, photograph: Image.Image) -> None:
        self.grey = photograph.convert("L").filter(ImageFilter.GaussianBlur(1.5))  # grain is no detail
        y, x = np.mgrid[-1 : 1 : self.GRID * 1j, -1 : 1 : self.GRID * 1j]
        self.slopes = np.stack([np.ones_like(x), x, y], -1).reshape(-1, 3)

    def __call__(self, window: Window) -> float:
        seen = np.asarray(cut(self.grey, window, self.GRID), dtype=np.float64).reshape(-1)
        weights, *_ = np.linalg.lstsq(self.slopes, seen, rcond=None)
        half = self.GRID // 2
        quarters = np.sort(seen.reshape(2, half, 2, half).std(axis=(1, 3)).reshape(-1))
        return float(np.std(seen - self.slopes @ weights)) if quarters[1] >= LEAST_IN_QUARTER else 0.0


def cut(photograph: Image.Image, window: Window, size: int) -> Image.Image:
    """The window's pixels, upright, `size` x `size`, interpolated bicubically."""
    (left, top), (right_x, right_y), _, (down_x, down_y) = window.corners
    across = ((right_x - left) / size, (right_y - top) / size)
    down = ((down_x - left) / size, (down_y - top) / size)
    inverse = (across[0], down[0], left, across[1], down[1], top)
    return photograph.transform((size, size), Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC)
