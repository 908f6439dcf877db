"""Retrieval and budget: who is asked for, and how a sample is evened out."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from curation.budget import balanced, kmeans
from curation.explain import explain
from curation.retrieval import COLLISIONS
from dinov2.exits import UserError
from tests.curation.pools import curate, decisions, make_pool


@given(st.lists(st.integers(0, 6), min_size=1, max_size=80), st.integers(1, 80), st.integers(0, 3))
def test_a_balanced_sample_has_the_budget_and_is_as_even_as_can_be(
    labels: list[int], budget: int, seed: int
) -> None:
    cluster = np.array(labels)
    budget = min(budget, len(labels))
    chosen = balanced(cluster, budget, np.random.default_rng(seed))
    assert len(chosen) == len(set(chosen.tolist())) == budget
    sizes, taken = Counter(labels), Counter(cluster[chosen].tolist())
    short = [taken[name] for name in sizes if taken[name] < sizes[name]]
    assert not short or max(taken.values()) <= min(short) + 1


def test_kmeans_finds_what_is_apart() -> None:
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(5, 16)) * 10
    truth = np.repeat(np.arange(5), 40)
    vectors = (centres[truth] + draw.normal(size=(200, 16))).astype(np.float32)
    cluster, distance = kmeans(vectors, 5, 20, np.random.default_rng(1))
    assert len({(a, b) for a, b in zip(truth.tolist(), cluster.tolist(), strict=True)}) == 5
    assert distance.mean() < 6


def test_collisions_keep_drop_and_refill() -> None:
    # Both seeds like picture 0 best, the second one more; then each has its own order.
    index = np.array([[0, 1, 2], [0, 2, 3]])
    similarity = np.array([[0.8, 0.7, 0.6], [0.9, 0.5, 0.4]], np.float32)
    asked = {
        name: sorted(zip(*(part.tolist() for part in choose(similarity, index, 1)[:2]), strict=True))
        for name, choose in COLLISIONS.items()
    }
    assert asked == {"keep": [(0, 0), (1, 0)], "drop": [(1, 0)], "refill": [(0, 1), (1, 0)]}


def test_seeds_bring_their_like_and_the_budget_holds(tmp_path: Path) -> None:
    root = make_pool(tmp_path)
    out = curate(f"pool={root}/pool", f"seeds={root}/seeds", f"output={root}/out", "budget.pictures=5")
    kept = [uri for uri, row in decisions(out).items() if row["kept"]]
    assert len(kept) == 5
    edges = parquet.read_table(out / "edges" / "retrieval.parquet").to_pylist()
    assert len(edges) == 4 * 4
    dropped = Counter(row["dropped_by"] for row in decisions(out).values())
    assert dropped["retrieval"] > 0 < dropped["budget"]
    (line,) = [line for line in explain(out, "copies/exact.png") if line.startswith("dropped")]
    assert line.startswith("dropped by duplicates, lost to")
    with pytest.raises(UserError, match="no picture"):
        list(explain(out, "nowhere.png"))
