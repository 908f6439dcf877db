"""An index finds what exact search finds, says how often, and stops where that is too seldom."""

from pathlib import Path

import numpy as np
import pytest

from dinov2.exits import NoProgress, UserError
from dinov2.neighbours import Index, Searcher, nearest

pytest.importorskip("faiss", reason="neither faiss-cpu nor faiss-gpu is installed")


def rows_of(count: int, seed: int = 0) -> np.ndarray:
    """A bent sheet of 12 dimensions in 64."""
    generator = np.random.default_rng(seed)
    rows = np.tanh(
        generator.standard_normal((count, 12)) @ np.random.default_rng(9).standard_normal((12, 64)) / 2
    )
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    return float(
        np.mean(
            [len(np.intersect1d(mine, right)) / len(right) for mine, right in zip(found, truth, strict=True)]
        )
    )


def searched(searcher: Searcher, queries: np.ndarray, base: np.ndarray, folder: Path, *, inside: bool):
    parts = [
        found
        for _, found in searcher.search(
            queries, base, 10, folder, searcher.blocks(len(queries)), inside=inside
        )
    ]
    return tuple(np.concatenate([np.asarray(part[side]) for part in parts]) for side in (0, 1))


@pytest.mark.parametrize("inside", [True, False])
def test_the_recall_is_reached_and_similarities_are_exact(tmp_path, inside):
    base = rows_of(20_000)
    queries = base if inside else rows_of(3000, seed=1)
    searcher = Searcher(engine="ivf", recall=0.97, floor=0.95)
    said = searcher.prepare(queries, base, tmp_path, inside=inside)
    similarity, index = searched(searcher, queries, base, tmp_path, inside=inside)
    truth = nearest(queries, base, 10, exclude_self=inside)[1].numpy()
    measured = recall(index, truth)
    assert measured >= 0.95
    assert abs(said["recall"] - measured) < 0.02  # as measured on 500 of the queries
    assert said["probes"] < said["lists"] // 2
    if inside:
        assert not (index == np.arange(len(base))[:, None]).any()
    products = (queries[:, None].astype(np.float64) * base[index].astype(np.float64)).sum(2)
    assert np.array_equal(similarity, products.astype(np.float32))


def test_lists_are_not_probed_for_what_codes_cannot_tell(tmp_path):
    base = rows_of(20_000)
    searcher = Searcher(engine="ivf", kind="IVF128,PQ8x4fs", recall=0.99, floor=0.1)
    said = searcher.prepare(base, base, tmp_path, inside=True)
    assert 0.1 <= said["recall"] < 0.97
    assert said["probes"] < said["lists"] // 2


def test_shards_searched_in_turn_are_one_index(tmp_path):
    base = rows_of(30_000)
    whole = Index.build(base, tmp_path / "whole")
    cut = Index.build(base, tmp_path / "cut", memory_gib=1e-5)
    assert len(list((tmp_path / "cut").glob("0*.faiss"))) == 4
    whole.probes = cut.probes = 24
    queries = rows_of(500, seed=2)
    found = [index.search(tensor_of(queries), 10)[1].numpy() for index in (whole, cut)]
    assert recall(found[1], found[0]) > 0.99  # only ties of codes may fall otherwise
    (tmp_path / "cut" / "00002.faiss").unlink()  # as if killed
    again = Index.build(base, tmp_path / "cut", memory_gib=1e-5)
    again.probes = 24
    assert np.array_equal(again.search(tensor_of(queries), 10)[1].numpy(), found[1])


def test_recall_under_the_floor_stops_with_advice(tmp_path):
    generator = np.random.default_rng(3)
    base = generator.standard_normal((20_000, 64)).astype(np.float16)
    with pytest.raises(NoProgress, match=r"search\.engine=exact"):
        Searcher(engine="ivf", kind="IVF64,PQ4x4fs").prepare(base, base, tmp_path, inside=True)
    with pytest.raises(UserError, match=r"search\.index=nonsense"):
        Searcher(engine="ivf", kind="nonsense").prepare(base, base, tmp_path / "other")
    assert Searcher().chosen(base, base) == "exact"


def tensor_of(rows: np.ndarray):
    import torch

    return torch.from_numpy(rows.astype(np.float32))
