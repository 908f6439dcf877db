"""Stage 6: at most so many pictures stay, sampled evenly over clusters of the embedding, or uniformly."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from curation.config import BudgetConfig
from curation.embed import Embedded
from curation.near import Rows
from curation.run import Run
from dinov2.data.manifest import clusters_schema, write_format

BEFORE = ["ingest", "duplicates", "holdout", "retrieval"]
TILE = 65_536

Vectors = NDArray[np.float32]


def run(run: Run) -> dict[str, Any]:
    """Draw the budget from what is left."""
    settings = run.config.budget
    pool = Embedded(run, "pool")
    live = np.flatnonzero(run.kept(pool.ids, BEFORE))
    if settings.pictures is None or settings.pictures >= len(live):
        run.drop("budget", {"id": []})
        return {"budget": settings.pictures, "dropped": 0}
    cluster = np.zeros(len(live), np.int64)
    if settings.sampling == "balanced":
        cluster, distance = _clusters(pool.vectors[live].astype(np.float32), settings, run.config.seed)
        table = pa.table({"id": pool.ids.take(live), "level_0": cluster, "distance": distance})
        write_format(run.folder / "clusters.parquet", table, clusters_schema(1))
    chosen = balanced(cluster, settings.pictures, np.random.default_rng([run.config.seed, 1]))
    lost = np.delete(live, chosen)
    run.drop("budget", {"id": pool.ids.take(lost).to_pylist()})
    return {"budget": settings.pictures, "dropped": len(lost), "clusters": len(np.unique(cluster))}


def balanced(cluster: Rows, budget: int, generator: np.random.Generator) -> Rows:
    """Rows of a sample of `budget` pictures that evens clusters out (Vo et al. 2024, arXiv 2405.15613).

    The largest cut with sum(min(cut, size)) <= budget is taken of every cluster; the remainder falls on
    random pictures of clusters that have more.
    """
    _, cluster, sizes = np.unique(cluster, return_inverse=True, return_counts=True)
    cut = int(np.searchsorted(_cumulative(sizes), budget, side="right")) - 1
    shuffled = generator.permutation(len(cluster))
    order = shuffled[np.argsort(cluster[shuffled], kind="stable")]
    place = np.empty(len(cluster), np.int64)
    place[order] = np.arange(len(cluster)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    chosen = place < cut
    spare = shuffled[(place == cut)[shuffled]]
    chosen[spare[: budget - int(chosen.sum())]] = True
    return np.flatnonzero(chosen)


def _cumulative(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """[largest + 1] sum(min(cut, size)) for every cut from 0."""
    more = np.bincount(sizes, minlength=int(sizes.max()) + 1)
    at_least = np.cumsum(more[::-1])[::-1]  # clusters of at least this size
    return np.concatenate([[0], np.cumsum(at_least[1:])])


def _clusters(vectors: Vectors, settings: BudgetConfig, seed: int) -> tuple[Rows, Vectors]:
    count = settings.clusters or max(1, math.isqrt(len(vectors)))
    with threadpool_limits(1):  # sums in one order, whatever the machine is busy with
        return kmeans(vectors, min(count, len(vectors)), settings.rounds, np.random.default_rng([seed, 0]))


def kmeans(vectors: Vectors, count: int, rounds: int, generator: np.random.Generator) -> tuple[Rows, Vectors]:
    """Cluster of each of [n, dim] vectors, and its distance to the centroid (Lloyd, from k-means++)."""
    centroids = _plus_plus(vectors, count, generator)
    cluster, distance = _assign(vectors, centroids)
    for _ in range(rounds):
        sums = np.zeros((count, vectors.shape[1]))
        np.add.at(sums, cluster, vectors)
        sizes = np.bincount(cluster, minlength=count)
        centroids = (sums / np.maximum(sizes, 1)[:, None]).astype(np.float32)
        empty = np.flatnonzero(sizes == 0)
        centroids[empty] = vectors[np.argsort(-distance, kind="stable")[: len(empty)]]
        before = cluster
        cluster, distance = _assign(vectors, centroids)
        if np.array_equal(before, cluster):
            break
    return cluster, distance


def _assign(vectors: Vectors, centroids: Vectors) -> tuple[Rows, Vectors]:
    cluster = np.empty(len(vectors), np.int64)
    distance = np.empty(len(vectors), np.float32)
    for at in range(0, len(vectors), TILE):
        rows = slice(at, at + TILE)
        squares = _squares(vectors[rows], centroids)
        cluster[rows] = squares.argmin(axis=1)
        distance[rows] = np.sqrt(squares.min(axis=1))
    return cluster, distance


def _plus_plus(vectors: Vectors, count: int, generator: np.random.Generator) -> Vectors:
    chosen = [int(generator.integers(len(vectors)))]
    nearest = _squares(vectors, vectors[chosen])[:, 0]
    while len(chosen) < count:
        total = np.cumsum(nearest, dtype=np.float64)
        drawn = np.searchsorted(total, generator.random() * total[-1], side="right")
        chosen.append(int(min(drawn, len(vectors) - 1)))
        nearest = np.minimum(nearest, _squares(vectors, vectors[chosen[-1:]])[:, 0])
    return vectors[chosen]


def _squares(vectors: Vectors, centroids: Vectors) -> Vectors:
    products = vectors @ centroids.T
    own, theirs = (vectors**2).sum(axis=1)[:, None], (centroids**2).sum(axis=1)[None, :]
    return (own - 2 * products + theirs).clip(min=0)
