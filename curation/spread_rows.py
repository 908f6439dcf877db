"""Rows that the ranks of a job hold parts of, read in tiles, and small values that all ranks share."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from dinov2.neighbours import Rows
from dinov2.parallel import all_sum, rank, world

CENTROID_TILE = 16_384

Vectors = NDArray[np.float32]
Whole = NDArray[np.int64]


class SpreadRows:
    """[n, dim] rows on this rank, n of its own on each; without a job, or `alone`, all of them."""

    def __init__(
        self,
        rows: Rows,
        spherical: bool,
        memory_gib: float,
        device: torch.device,
        seed: int,
        alone: bool = False,
    ) -> None:
        self.rows, self.spherical, self.device, self.seed = rows, spherical, device, seed
        self.rank, self.world = (0, 1) if alone else (rank(), world())
        self.memory = int(memory_gib * 2**30)
        counts = self.from_all(torch.tensor([len(rows)]))[:, 0].numpy()
        self.total, self.first = int(counts.sum()), int(counts[: self.rank].sum())
        if self.total == 0:
            raise ValueError("no rows to cluster")

    def proposed(
        self, mine: Whole, key: NDArray[np.float64], count: int, none: float
    ) -> tuple[Vectors, NDArray[np.float64]]:
        """[ranks, count, dim] rows that ranks propose; [ranks, count] keys, `none` where there is none."""
        packed = torch.zeros(count, self.rows.shape[1] + 1, dtype=torch.float64)
        packed[:, -1] = none
        if len(mine):
            packed[: len(mine), :-1] = self.tile(mine).double().cpu()
            packed[: len(mine), -1] = torch.from_numpy(key)
        packed = self.from_all(packed).numpy()
        return packed[..., :-1].astype(np.float32), packed[..., -1]

    def sample(self, size: int, generator: np.random.Generator) -> Vectors:
        """[size, dim] rows of all ranks, the same whatever the number of ranks."""
        wanted = np.sort(_distinct(self.total, size, generator))
        inside = (wanted >= self.first) & (wanted < self.first + len(self.rows))
        sample = torch.zeros(size, self.rows.shape[1])
        for part in self.tiles(size, 1):
            mine = wanted[part][inside[part]] - self.first
            if len(mine):
                sample[part][torch.from_numpy(inside[part])] = self.tile(mine).cpu()
        return self.summed(sample).numpy()

    def tile(self, part: slice | Whole) -> torch.Tensor:
        rows = self.rows[part]
        tile = rows if isinstance(rows, torch.Tensor) else torch.from_numpy(np.array(rows))
        tile = tile.to(self.device, torch.float32)
        if not torch.isfinite(tile).all():
            raise ValueError("a row to cluster holds NaN or infinity")
        return torch.nn.functional.normalize(tile, dim=1) if self.spherical else tile

    def tiles(self, rows: int, centroids: int) -> Iterator[slice]:
        """Tiles whose products take at most half of the memory, and whose rows at most a quarter."""
        products = self.memory // (8 * min(centroids, CENTROID_TILE))
        tall = max(1, min(products, self.memory // (32 * self.rows.shape[1]), 8192))
        return (slice(at, min(at + tall, rows)) for at in range(0, rows, tall))

    def summed(self, value: torch.Tensor) -> torch.Tensor:
        return value if self.world == 1 else all_sum(value)

    def from_all(self, value: torch.Tensor) -> torch.Tensor:
        """[ranks, …] the value of every rank."""
        every = torch.zeros(self.world, *value.shape, dtype=value.dtype)
        every[self.rank] = value
        return self.summed(every)

    def from_main(self, value: Vectors) -> Vectors:
        """Rank 0's: processors of other makes may round otherwise."""
        return self.from_all(torch.from_numpy(value))[0].numpy()


def _distinct(total: int, size: int, generator: np.random.Generator) -> Whole:
    """`size` different numbers under `total`, in memory for those alone."""
    if size > total // 2:
        return generator.permutation(total)[:size]
    found = np.zeros(0, np.int64)
    while len(found) < size:
        found = np.unique(np.concatenate([found, generator.integers(total, size=size)]))
    return generator.permutation(found)[:size]
