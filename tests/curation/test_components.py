"""Components equal scipy's, whatever the order of the edges, the chunks and the shape of the graph."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from scipy import sparse
from scipy.sparse import csgraph

from curation import components as module
from curation.components import Components, components


def by_scipy(count: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    graph = sparse.coo_matrix((np.ones(len(a)), (a, b)), shape=(count, count))
    _, label = csgraph.connected_components(graph, directed=False)
    first = np.full(label.max() + 1, count)
    np.minimum.at(first, label, np.arange(count))
    return first[label]


def graph(kind: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    chain = np.stack([np.arange(count - 1), np.arange(1, count)])
    edges = {
        "random": generator.integers(count, size=(2, count)),
        "sparse": generator.integers(count, size=(2, count // 3)),
        "chain": chain,
        "chain backwards": chain[:, ::-1],
        "chain shuffled": generator.permutation(count)[chain][:, generator.permutation(count - 1)],
        "star": np.stack([np.full(count - 1, count - 1), np.arange(count - 1)]),
        "loops": np.stack([np.arange(0, count, 7)] * 2),
    }[kind]
    return edges[0], edges[1]


@pytest.mark.parametrize(
    "kind", ["random", "sparse", "chain", "chain backwards", "chain shuffled", "star", "loops"]
)
@pytest.mark.parametrize("chunk", [1, 97, 1 << 20])
def test_components_are_those_of_scipy(kind, chunk, monkeypatch):
    count = 2000 if chunk == 1 else 100_000
    monkeypatch.setattr(module, "CHUNK", chunk)
    a, b = graph(kind, count)
    found = Components(count)
    for part in np.array_split(np.arange(len(a)), 3):
        found.join(a[part], b[part])
    assert np.array_equal(found.labels(), by_scipy(count, a, b))


def test_edges_come_from_files_above_a_similarity(tmp_path: Path):
    a, b = graph("random", 5000)
    similarity = np.random.default_rng(1).random(5000).astype(np.float32)
    similarity[:10] = np.float32(0.6)
    for number, part in enumerate(np.array_split(np.arange(5000), 4)):
        table = {"a": a[part], "b": b[part], "similarity": similarity[part]}
        parquet.write_table(pa.table(table), tmp_path / f"{number}.parquet")
    files = sorted(tmp_path.glob("*.parquet"))
    counts = similarity >= np.float32(0.6)
    expected = by_scipy(5000, a[counts], b[counts])
    assert np.array_equal(components(5000, files, least=0.6), expected)
    assert np.array_equal(components(5000, files[::-1], least=0.6), expected)
    assert np.array_equal(components(5000, files), by_scipy(5000, a, b))
    with pytest.raises(ValueError, match="outside of 0 to 4998"):
        components(4999, files)
