"""Flat k-means of more rows than memory holds: Lloyd's rounds over tiles, from a fast k-means++, then mended.

Three steps, each a stream over the rows (a memory map of fp16 will do):

1. start: D² sampling (k-means++, Arthur and Vassilvitskii 2007) on a sample of the rows, a batch of centroids
   at a time, as k-means|| does (Bahmani et al. 2012), so that it costs about one assignment of the sample;
   of few centroids one at a time, the best of several (greedy k-means++);
2. Lloyd's rounds until the objective stands still;
3. mending: the centroids that are missed least move into the clusters with the largest error; a move that
   does not lower the objective is taken back (after the breathing k-means of Fritzke, arXiv 2006.15666).

What is held is a tile of products, and 12 bytes a row. In a torchrun job every rank brings its own rows and
calls `kmeans` with equal settings; sums go through `dinov2.parallel.all_sum`, and all ranks end with the same
centroids. One machine gives the same clusters each time, whatever the number of its threads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from curation.spread_rows import CENTROID_TILE, SpreadRows, Vectors, Whole
from dinov2.neighbours import Rows

BATCH = 16  # a batch of the start is this fraction of the centroids that are there
GREEDY = 1000  # centroids up to which the start draws one at a time, the best of several
SAMPLE = 64  # rows for each centroid that the start looks at
SETTLE = 4  # rounds after a move, before it is judged
NEVER = 1e300  # a finite number: infinity would not survive a sum over ranks
STANDSTILL = 1e-4  # relative gain of a round under which it was the last


@dataclass(frozen=True)
class Clustering:
    """A clustering of n rows (in a torchrun job: of this rank's) into k clusters."""

    centroids: Vectors  # [k, dim]; of length 1 if spherical
    cluster: Whole  # [n]
    distance: Vectors  # [n] Euclidean, to the centroid
    sizes: Whole  # [k] over all ranks; none is 0 unless there are fewer different rows than clusters
    objective: float  # sum of squared distances, over all ranks
    rounds: int  # passes over all rows


def kmeans(
    rows: Rows,
    count: int,
    *,
    seed: int,
    spherical: bool = False,
    rounds: int = 50,
    mending: bool = True,
    memory_gib: float = 1.0,
    device: torch.device | str = "cpu",
) -> Clustering:
    """Cluster [n, dim] rows of any float type into `count` clusters, at most as many as there are rows.

    Args:
        spherical: rows and centroids are taken at length 1, so that a cluster is by cosine (SemDeDup, arXiv
            2303.09540, sec. 3). The rows given need not be normalised.
        rounds: of Lloyd, at most, before mending.
        mending: see above; off saves about two thirds of the time.
        memory_gib: bound on what is held besides the rows, the centroids and 12 bytes a row.

    Raises:
        ValueError: no rows, a count under 1, or a row with NaN or infinity.
    """
    if count < 1:
        raise ValueError(f"{count} clusters")
    with torch.no_grad(), _deterministic():
        fit = _Fit(rows, spherical, memory_gib, torch.device(device), seed)
        state = fit.assigned(fit.start(min(count, fit.total)))
        state = fit.settled(state, rounds)
        if mending and len(state.centroids) > 1:
            state = fit.mended(state)
    return Clustering(
        state.centroids,
        state.cluster.astype(np.int64),
        state.distance,
        state.sizes,
        state.objective,
        fit.rounds,
    )


def assign(
    rows: Rows,
    centroids: Vectors,
    *,
    spherical: bool = False,
    memory_gib: float = 1.0,
    device: torch.device | str = "cpu",
) -> tuple[Whole, Vectors]:
    """The nearest centroid of each row, int64 [n], lower numbers first, and the distance to it, [n]."""
    with torch.no_grad():
        fit = _Fit(rows, spherical, memory_gib, torch.device(device), 0, alone=True)
        state = fit.assigned(centroids)
    return state.cluster.astype(np.int64), state.distance


@dataclass(frozen=True)
class _State:
    """Centroids, and what assigning all rows to them gave. Only cluster and distance are this rank's."""

    centroids: Vectors
    cluster: NDArray[np.int32]
    distance: Vectors
    objective: float
    sizes: Whole
    means: Vectors  # of the clusters; zero for an empty one
    error: NDArray[np.float64]  # [k] sum of squared distances
    missed: NDArray[np.float64]  # [k] by how much the error would grow without this centroid


class _Fit(SpreadRows):
    """Rows, and what a k-means does with them."""

    rounds = 0  # passes over all rows so far

    def start(self, count: int) -> Vectors:
        """[count, dim] rows drawn with probability in proportion to the squared distance from those drawn."""
        generator = np.random.default_rng([self.seed, 0])
        sample = torch.from_numpy(self.sample(max(count, min(self.total, SAMPLE * count)), generator))
        nearest = np.full(len(sample), np.inf, np.float32)
        chosen: list[int] = [int(generator.integers(len(sample)))]
        fresh = chosen
        tried = 2 + int(np.log(count)) if count <= GREEDY else 1
        while len(chosen) < count:
            nearest = self._closer(sample, nearest, fresh)
            nearest[chosen] = 0
            weights = nearest.astype(np.float64)
            if not weights.any():  # nothing but copies of those drawn is left
                weights[np.setdiff1d(np.arange(len(sample)), chosen)] = 1
            size = tried if tried > 1 else min(count - len(chosen), max(1, len(chosen) // BATCH))
            size = min(size, int((weights > 0).sum()))
            # An exponential race draws several at once, without replacement, in proportion to the weights.
            with np.errstate(divide="ignore"):
                times = generator.exponential(size=len(weights)) / weights
            fresh = np.argpartition(times, size - 1)[:size].tolist()
            if tried > 1:  # of several, the one that leaves the least
                fresh = [fresh[self._left(sample, nearest, fresh).argmin()]]
            chosen += fresh
        return self.from_main(sample[chosen].numpy())

    def _closer(self, sample: torch.Tensor, nearest: Vectors, fresh: list[int]) -> Vectors:
        """[n] squared distances to the nearest centroid, once these rows are centroids too."""
        nearest = nearest.copy()
        for part in self.tiles(len(sample), len(fresh)):
            nearest[part] = np.minimum(nearest[part], _nearest(sample[part], sample[fresh])[0])
        return nearest

    def _left(self, sample: torch.Tensor, nearest: Vectors, rows: list[int]) -> NDArray[np.float64]:
        """For each of these rows the sum of squared distances, were it a centroid too."""
        left = np.zeros(len(rows))
        norms = (sample[rows] ** 2).sum(1)
        for part in self.tiles(len(sample), len(rows)):
            tile = sample[part]
            squares = (tile * tile).sum(1)[:, None] + norms - 2 * tile @ sample[rows].T
            left += np.minimum(squares.numpy(), nearest[part, None]).sum(0, dtype=np.float64)
        return left

    def settled(self, state: _State, rounds: int) -> _State:
        """Lloyd's rounds until the objective stands still."""
        for _ in range(rounds):
            before = state.objective
            state = self.assigned(self._moved(state))
            still = before - state.objective <= STANDSTILL * before
            if still and (state.sizes.all() or state.objective == 0):
                break
        return state

    def mended(self, state: _State) -> _State:
        """Move centroids from where they are missed least to where the error is largest, while that helps."""
        moves = max(1, len(state.centroids) // 8)
        while moves:
            trial = self.settled(self.assigned(self._relocated(state, moves)), SETTLE)
            if trial.objective < state.objective * (1 - STANDSTILL):
                state = trial
            else:
                moves //= 2
        return self.settled(state, SETTLE)

    def assigned(self, centroids: Vectors) -> _State:
        """Assign all rows."""
        count, width = centroids.shape
        mine, there = len(self.rows), torch.from_numpy(centroids).to(self.device)
        cluster, distance = np.empty(mine, np.int32), np.empty(mine, np.float32)
        sums = torch.zeros(count, width, dtype=torch.float64, device=self.device)
        totals = np.zeros((3, count))
        for part in self.tiles(mine, count):
            tile = self.tile(part)
            best, second, where = _nearest(tile, there)
            distance[part], cluster[part] = np.sqrt(best), where
            sums.index_add_(0, torch.from_numpy(where).to(self.device), tile.double())
            weights = (np.ones_like(best), best, second - best)
            totals += np.stack([np.bincount(where, weight, minlength=count) for weight in weights])
        sizes, error, missed = self.summed(torch.from_numpy(totals)).numpy()
        means = self.summed(sums.cpu()).numpy() / np.maximum(sizes, 1)[:, None]
        self.rounds += 1
        return _State(
            centroids=centroids,
            cluster=cluster,
            distance=distance,
            objective=float(error.sum()),
            sizes=sizes.astype(np.int64),
            means=means.astype(np.float32),
            error=error,
            missed=missed,
        )

    def _moved(self, state: _State) -> Vectors:
        """The clusters' means; empty clusters take the rows that are farthest from their centroid."""
        centroids = _unit(state.means) if self.spherical else state.means.copy()
        empty = np.flatnonzero(state.sizes == 0)
        if len(empty):
            far = np.argsort(-state.distance, kind="stable")[: len(empty)]
            vectors, distance = self.proposed(
                far, state.distance[far].astype(np.float64), len(empty), none=-1
            )
            order = np.argsort(-distance.ravel(), kind="stable")[: len(empty)]
            centroids[empty] = vectors.reshape(-1, centroids.shape[1])[order]
        return centroids

    def _relocated(self, state: _State, moves: int) -> Vectors:
        from_ = _apart(state.centroids, np.argsort(state.missed, kind="stable"), moves)
        rest = np.setdiff1d(np.arange(len(state.centroids)), from_)
        to = rest[np.argsort(-state.error[rest], kind="stable")][: len(from_)]
        from_ = from_[: len(to)]
        # One row of each of these clusters, drawn by the squared distance: the first of an exponential race
        # whose chances hang on the row's number alone, so that ranks do not change it.
        place = np.full(len(state.centroids), -1)
        place[to] = np.arange(len(to))
        rows = np.flatnonzero(place[state.cluster] >= 0)
        with np.errstate(divide="ignore"):
            chance = -np.log(_uniform(rows + self.first, self.seed + self.rounds))
            times = np.minimum(chance / state.distance[rows].astype(np.float64) ** 2, NEVER)
        order = np.lexsort((times, place[state.cluster[rows]]))
        clusters, first = np.unique(place[state.cluster[rows[order]]], return_index=True)
        mine, time = np.zeros(len(to), np.int64), np.full(len(to), NEVER)
        mine[clusters], time[clusters] = rows[order[first]], times[order[first]]
        vectors, times = self.proposed(mine if len(self.rows) else mine[:0], time, len(to), none=NEVER)
        centroids = state.centroids.copy()
        centroids[from_] = vectors[times.argmin(0), np.arange(len(to))]
        return centroids


def _nearest(tile: torch.Tensor, centroids: torch.Tensor) -> tuple[Vectors, Vectors, Whole]:
    """Squared distances of each row to its nearest centroid and to the next one, and which is the nearest."""
    rows, where = np.arange(len(tile)), np.zeros(len(tile), np.int64)
    best, next_ = (np.full(len(tile), np.inf, np.float32) for _ in range(2))
    for first in range(0, len(centroids), CENTROID_TILE):
        some = centroids[first : first + CENTROID_TILE]
        half = (some * some).sum(1) / 2
        scores = torch.addmm(half, tile, some.T, alpha=-1).cpu().numpy()  # (|x - c|² - |x|²) / 2
        place = scores.argmin(1)  # NumPy's reads float32 several times as fast as torch's on a CPU
        value = scores[rows, place]
        scores[rows, place] = np.inf
        next_ = np.minimum(np.minimum(next_, scores.min(1)), np.maximum(best, value))
        better = value < best
        best[better], where[better] = value[better], place[better] + first
    # Again from the difference, since the square of a small distance is lost between large products.
    apart = tile - centroids[torch.from_numpy(where).to(tile.device)]
    square = (apart * apart).sum(1).cpu().numpy()
    second = (tile * tile).sum(1).cpu().numpy() + 2 * np.where(np.isinf(next_), best, next_)
    return square, np.maximum(second, square), where


def _apart(centroids: Vectors, order: Whole, count: int) -> Whole:
    """The first `count` of this order, but of any two that are each other's nearest only the first.

    Two centroids that share a cluster are each missed little, but not both.
    """
    tiles = torch.from_numpy(centroids)
    partner = np.full(len(centroids), -1)
    taken: list[int] = []
    for row in order[: 2 * count].tolist():
        if len(taken) == count:
            break
        apart = ((tiles - tiles[row]) ** 2).sum(1)
        apart[row] = np.inf
        partner[row] = int(apart.argmin())
        if partner[row] not in taken:
            taken.append(row)
    return np.array(taken, np.int64)


def _uniform(numbers: Whole, seed: int) -> NDArray[np.float64]:
    """A number in (0, 1) for each number, by splitmix64 (Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        state = (numbers.astype(np.uint64) + np.uint64(seed + 1)) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((state ^ (state >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53 + 2.0**-54


def _unit(vectors: Vectors) -> Vectors:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Sums by index in one order on a GPU too; float32 products in float32."""
    before, precision = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.set_float32_matmul_precision(precision)
