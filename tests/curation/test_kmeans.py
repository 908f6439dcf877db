"""k-means is no worse than scikit-learn's, and does not depend on threads, storage and ranks."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from curation.hierarchy import Hierarchy, hierarchical
from curation.kmeans import Clustering, assign, kmeans
from tests.ranks import on_ranks


def rows_of(count: int, width: int = 24) -> np.ndarray:
    """Bent sheets in some 60 groups of unequal size."""
    generator = np.random.default_rng(5)
    centres = generator.standard_normal((60, 8)) * 2
    group = (60 * generator.random(count) ** 2).astype(int)
    latent = centres[group] + generator.standard_normal((count, 8))
    return np.tanh(latent @ generator.standard_normal((8, width)) / 3).astype(np.float32)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def half_of(rows: np.ndarray, ranks: int) -> np.ndarray:
    from dinov2.parallel import rank

    return np.array_split(rows, [len(rows) // 5])[rank()] if ranks == 2 else rows


def fit_part(rows: np.ndarray, ranks: int, spherical: bool) -> Clustering:
    return kmeans(half_of(rows, ranks), 40, seed=3, spherical=spherical)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_objective_is_no_worse_than_scikit_learns(seed):
    rows = rows_of(6000)
    ours = kmeans(rows, 150, seed=seed)
    theirs = KMeans(150, random_state=seed, n_init=1).fit(rows)  # pyright: ignore[reportArgumentType]  # documented
    assert ours.objective <= theirs.inertia_  # pyright: ignore[reportOperatorIssue]  # set by fit
    apart = rows.astype(np.float64) - ours.centroids[ours.cluster]
    assert np.isclose(ours.objective, (apart**2).sum(), rtol=1e-5)
    assert np.allclose(ours.distance, np.linalg.norm(apart, axis=1), atol=1e-5)
    assert np.array_equal(ours.sizes, np.bincount(ours.cluster, minlength=150))
    assert ours.sizes.all()


@pytest.mark.parametrize("spherical", [False, True])
def test_each_row_is_with_its_nearest_centroid(spherical):
    rows = rows_of(3000) * np.linspace(0.5, 2, 3000, dtype=np.float32)[:, None]
    found = kmeans(rows, 30, seed=0, spherical=spherical)
    seen = rows / np.linalg.norm(rows, axis=1, keepdims=True) if spherical else rows
    squares = ((seen[:, None].astype(np.float64) - found.centroids[None]) ** 2).sum(2)
    assert np.allclose(squares.min(1), squares[np.arange(3000), found.cluster], atol=1e-5)
    if spherical:
        assert np.allclose(np.linalg.norm(found.centroids, axis=1), 1, atol=1e-6)
    cluster, distance = assign(rows, found.centroids, spherical=spherical)
    assert np.array_equal(cluster, found.cluster)
    assert np.array_equal(distance, found.distance)


def test_threads_and_the_type_of_storage_change_nothing(tmp_path):
    rows = rows_of(4000).astype(np.float16)
    np.save(tmp_path / "rows.npy", rows)
    whole = kmeans(rows.astype(np.float32), 50, seed=1)
    with threads(2):
        again = kmeans(rows, 50, seed=1)
    assert np.array_equal(whole.centroids, again.centroids)
    mapped = kmeans(np.load(tmp_path / "rows.npy", mmap_mode="r"), 50, seed=1)
    assert np.array_equal(whole.cluster, mapped.cluster)
    assert np.array_equal(whole.centroids, mapped.centroids)
    small = kmeans(rows, 50, seed=1, memory_gib=1e-4)  # other tiles: the last bits of sums may differ
    assert (small.cluster == whole.cluster).mean() > 0.99
    assert np.isclose(small.objective, whole.objective, rtol=1e-3)


@pytest.mark.parametrize("spherical", [False, True])
def test_two_ranks_cluster_as_one(spherical):
    rows = rows_of(3000)
    alone = kmeans(rows, 40, seed=3, spherical=spherical)
    parts = on_ranks(2, fit_part, rows, 2, spherical)
    assert np.array_equal(parts[0].centroids, parts[1].centroids)
    assert np.array_equal(np.concatenate([part.cluster for part in parts]), alone.cluster)
    assert np.allclose(parts[0].centroids, alone.centroids, atol=1e-6)
    assert np.array_equal(parts[1].sizes, alone.sizes)


def levels_of_part(rows: np.ndarray, ranks: int, counts: list[int], resamplings: int) -> Hierarchy:
    return hierarchical(half_of(rows, ranks), counts, seed=3, resamplings=resamplings)


@pytest.mark.parametrize(("counts", "resamplings"), [([40, 8], 0), ([40, 8, 1], 2)])
def test_two_ranks_find_the_levels_of_one(counts, resamplings):
    rows = rows_of(3000)
    alone = hierarchical(rows, counts, seed=3, resamplings=resamplings)
    parts = on_ranks(2, levels_of_part, rows, 2, counts, resamplings)
    for level, cluster in enumerate(alone.levels):
        assert np.array_equal(np.concatenate([part.levels[level] for part in parts]), cluster)
        assert np.allclose(parts[0].centroids[level], alone.centroids[level], atol=1e-5)
        assert np.array_equal(parts[0].centroids[level], parts[1].centroids[level])
    assert np.allclose(np.concatenate([part.distance for part in parts]), alone.distance, atol=1e-5)


def test_more_clusters_than_different_rows():
    rows = np.repeat(np.eye(5, dtype=np.float32), 4, axis=0)
    found = kmeans(rows, 8, seed=0)
    assert found.objective == 0
    assert len(np.unique(found.cluster)) == 5
    assert len(kmeans(rows, 50, seed=0).centroids) == 20
    with pytest.raises(ValueError, match="no rows"):
        kmeans(rows[:0], 3, seed=0)
    rows[3, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        kmeans(rows, 3, seed=0)
