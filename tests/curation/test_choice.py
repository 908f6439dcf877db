"""Retrieval and budget: who is asked for, and how a sample is evened out."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from scipy.stats import entropy

from curation.budget import portions
from curation.explain import explain
from curation.hierarchy import hierarchical, sampled, shares
from curation.retrieval import COLLISIONS
from dinov2.exits import UserError
from tests.curation.pools import curate, decisions, make_pool


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 60), st.integers(0, 3))
def test_shares_are_those_of_the_largest_cut_found_by_trying_all(
    sizes: list[int], budget: int, seed: int
) -> None:
    taken = shares(np.array(sizes), budget, np.random.default_rng(seed))
    affordable = [cut for cut in range(max(sizes) + 1) if sum(min(cut, size) for size in sizes) <= budget]
    cut = max(affordable)
    least = np.minimum(sizes, cut)
    assert taken.sum() == min(budget, sum(sizes))
    assert set((taken - least).tolist()) <= {0, 1}
    assert (taken <= sizes).all()


def test_a_sample_from_two_levels_meets_every_clusters_share() -> None:
    draw = np.random.default_rng(0)
    fine = draw.choice(12, size=600, p=np.arange(1, 13) ** 2 / (np.arange(1, 13) ** 2).sum())
    levels = [fine, fine // 4]
    for budget in (1, 17, 100, 599, 600, 900):
        chosen = sampled(levels, budget, np.random.default_rng(1))
        assert len(set(chosen.tolist())) == len(chosen) == min(budget, 600)
        assert np.array_equal(chosen, sampled(levels, budget, np.random.default_rng(1)))
        sizes = np.bincount(levels[1])
        taken = np.bincount(levels[1][chosen], minlength=3)
        cut = taken[taken < sizes]
        assert not len(cut) or taken.max() <= cut.min() + 1
        for group in range(3):  # inside a cluster its children are cut alike
            mine = fine[chosen][levels[1][chosen] == group]
            part, whole = (
                np.bincount(rows, minlength=12)[group * 4 : group * 4 + 4] for rows in (mine, fine)
            )
            short = part[part < whole]
            assert not len(short) or part.max() <= short.min() + 1


def test_a_hierarchy_evens_out_what_a_random_sample_does_not() -> None:
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(20, 12)) * 4
    truth = draw.choice(20, size=4000, p=np.geomspace(1, 200, 20) / np.geomspace(1, 200, 20).sum())
    vectors = (centres[truth] + draw.normal(size=(4000, 12))).astype(np.float32)
    first, again = (hierarchical(vectors, [60, 20], seed=3, resamplings=2, nearest=5) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first.levels, again.levels, strict=True))
    assert len(set(zip(*(level.tolist() for level in first.levels), strict=True))) == 60  # levels are nested
    even = np.bincount(truth[sampled(first.levels, 300, np.random.default_rng(0))], minlength=20)
    random = np.bincount(truth[draw.permutation(4000)[:300]], minlength=20)
    assert entropy(even) > 0.9 * np.log(20) > entropy(random) + 0.1


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 4)), min_size=1, max_size=4), st.integers(0, 90))
def test_a_mix_goes_by_weight_and_what_one_part_lacks_to_the_others(
    parts: list[tuple[int, int]], budget: int
) -> None:
    sizes, weights = (np.array(column) for column in zip(*parts, strict=True))
    taken = portions(sizes, weights.astype(float), budget)
    assert taken.sum() == min(budget, sizes[weights > 0].sum())
    assert (taken <= sizes).all()
    short = (taken < sizes) & (weights > 0)
    for part in np.flatnonzero(short):  # nobody has more than one beyond the share of one who could take more
        assert (taken[weights > 0] <= weights[weights > 0] / weights[part] * (taken[part] + 1) + 1).all()


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
    told = "\n".join(explain(out, kept[0]))
    for words in (
        "perceptual hash",
        "asked for by the seed",
        "class_",
        "clusters: level_0",
        "\nkept",
        "shards/0",
    ):
        assert words in told
    with pytest.raises(UserError, match="no picture"):
        list(explain(out, "nowhere.png"))
