"""Hierarchical k-means and balanced sampling from it (Vo et al. 2024, arXiv 2405.15613, secs. 3.2 to 3.4).

Pictures are clustered; then the centroids are, as if each were one picture; and so on. A dense region of the
pool has many centroids on the first level, but each counts once on the next, so that the levels' clusters
come nearer to an even cover of what there is. Resampling goes further in the same direction on each level:
only the few members nearest to each centroid take part in the next fit, then all are assigned again.

In a torchrun job every rank brings its own rows, and a share of the centroids to the levels above.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from curation.kmeans import assign, kmeans
from dinov2.neighbours import Rows as Vectors
from dinov2.neighbours.rows import Selected
from dinov2.parallel import all_gather_objects, rank, world

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Hierarchy:
    """Clusters of n pictures (in a torchrun job: of this rank's) on L levels, the finest first."""

    levels: list[Rows]  # L arrays [n]: the cluster of each picture on that level
    distance: NDArray[np.float32]  # [n] Euclidean, to the centroid of the finest level
    centroids: list[NDArray[np.float32]]  # [k, dim] of each level


def hierarchical(
    rows: Vectors,
    counts: Sequence[int],
    *,
    seed: int,
    resamplings: int = 0,
    nearest: int = 3,
    rounds: int = 50,
    memory_gib: float = 1.0,
    device: torch.device | str = "cpu",
) -> Hierarchy:
    """Cluster [n, dim] rows into counts[0] clusters, their centroids into counts[1], and so on.

    Args:
        counts: falling; each is clipped to what is there to cluster.
        resamplings: times that a level is fitted again to the members nearest to its centroids.
        nearest: so many of each cluster (r in the paper).

    Raises:
        ValueError: no level, or levels that do not fall.
    """
    if not counts or any(above >= below for below, above in pairwise(counts)):
        raise ValueError(f"levels {list(counts)}: give one or more falling numbers of clusters")
    levels: list[Rows] = []
    centroids: list[NDArray[np.float32]] = []
    distance = np.zeros(0, np.float32)
    mine: Vectors = rows
    where = {"memory_gib": memory_gib, "device": device}
    fit = partial(kmeans, rounds=rounds, **where)
    for level, count in enumerate(counts):
        found = fit(mine, count, seed=_seed(seed, level, 0))
        cluster, apart, middles = found.cluster, found.distance, found.centroids
        for again in range(1, resamplings + 1):
            core = Selected(mine, _closest_of_all(cluster, apart, nearest))
            middles = fit(core, len(middles), seed=_seed(seed, level, again)).centroids
            cluster, apart = assign(mine, middles, **where)
        if level == 0:
            distance = apart
            levels.append(cluster)
        else:
            levels.append(np.concatenate(all_gather_objects(cluster))[levels[-1]])
        centroids.append(middles)
        mine = np.array_split(middles, world())[rank()]
    return Hierarchy(levels, distance, centroids)


def _closest_of_all(cluster: Rows, distance: NDArray[np.float32], count: int) -> Rows:
    """This rank's rows among the `count` of all ranks nearest to their cluster's centroid, rising."""
    mine = closest(cluster, distance, count)
    every = all_gather_objects((cluster[mine], distance[mine]))
    clusters, distances = (np.concatenate(part) for part in zip(*every, strict=True))
    chosen = closest(clusters, distances, count)
    chosen -= sum(len(part) for part, _ in every[: rank()])
    return mine[chosen[(chosen >= 0) & (chosen < len(mine))]]


def closest(cluster: Rows, distance: NDArray[np.float32], count: int) -> Rows:
    """The rows among the `count` nearest to their cluster's centroid, rising."""
    order = np.lexsort((np.arange(len(cluster)), distance, cluster))
    return np.sort(order[place_in_group(cluster[order]) < count])


def sampled(levels: Sequence[Rows], budget: int, generator: np.random.Generator) -> Rows:
    """Rows of a balanced sample of min(budget, n) pictures, rising.

    From the top level down, each cluster's share is handed on to its children by `shares`; a leaf's share is
    drawn at random from its pictures.

    Args:
        levels: clusters [n] of each picture, finest first, each level's inside those of the next.
    """
    count = len(levels[0])
    parent, share = np.zeros(count, np.int64), np.array([min(budget, count)])
    for level in reversed(levels):
        _, first, cluster, sizes = np.unique(
            level, return_index=True, return_inverse=True, return_counts=True
        )
        above = parent[first]  # [clusters] which cluster of the level above each lies in
        order = np.argsort(above, kind="stable")
        below = np.zeros(len(sizes), np.int64)
        bounds = np.searchsorted(above[order], np.arange(len(share) + 1))
        for group, (start, stop) in enumerate(pairwise(bounds)):
            children = order[start:stop]
            below[children] = shares(sizes[children], int(share[group]), generator)
        parent, share = cluster.ravel(), below
    shuffled = generator.permutation(count)
    order = shuffled[np.argsort(parent[shuffled], kind="stable")]
    return np.sort(order[place_in_group(parent[order]) < share[parent[order]]])


def shares(sizes: Rows, budget: int, generator: np.random.Generator) -> Rows:
    """[k] how many of each cluster: min(cut, size) for the largest cut that the budget allows.

    That is the largest cut with sum(min(cut, size)) <= budget; the remainder falls, one each, on random
    clusters that have more. Sums to min(budget, sum of sizes).
    """
    ordered = np.sort(sizes)
    below = np.concatenate([[0], np.cumsum(ordered)])  # what clusters smaller than the cut give
    # A cut of ordered[i] costs below[i] + ordered[i] * (k - i); between two sizes it grows by k - i a step.
    costs = below[:-1] + ordered * np.arange(len(sizes), 0, -1)
    whole = int(np.searchsorted(costs, budget, side="right"))  # so many clusters are taken whole
    if whole == len(sizes):
        return sizes.copy()
    cut = int(budget - below[whole]) // (len(sizes) - whole)
    taken = np.minimum(sizes, cut)
    spare = np.flatnonzero(sizes > cut)
    taken[generator.permutation(spare)[: budget - int(taken.sum())]] += 1
    return taken


def place_in_group(sorted_groups: Rows) -> Rows:
    """[n] 0, 1, 2, … within each run of equal numbers."""
    starts = np.flatnonzero(np.diff(sorted_groups, prepend=np.nan) != 0)
    lengths = np.diff(np.append(starts, len(sorted_groups)))
    return np.arange(len(sorted_groups)) - np.repeat(starts, lengths)


def _seed(seed: int, level: int, again: int) -> int:
    return int(np.random.SeedSequence([seed, level, again]).generate_state(1)[0])
