"""The order of data: exact permutations, well mixed, near each other in a window, at a known cost."""

import pickle
from itertools import pairwise, permutations

import numpy as np
import pytest
from scipy.stats import chisquare, kstest

from dinov2.data.order import LARGEST, Order, Permutation, derive_seed
from tests.dinov2.data.cost import cost


def test_every_size_gives_a_permutation():
    for n in [*range(1, 200), 1000, 4096, 4097, 65_537, 99_991]:
        permutation = Permutation(n, key=n)
        assert sorted(permutation(i) for i in range(n)) == list(range(n)), n


def test_the_largest_size_is_injective_and_in_range():
    permutation = Permutation(LARGEST, key=5)
    images = {permutation(i) for i in [*range(10_000), *range(LARGEST - 10_000, LARGEST)]}
    assert len(images) == 20_000
    assert kstest(np.array(sorted(images)) / LARGEST, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("n", [0, LARGEST + 1])
def test_other_sizes_are_refused(n: int):
    with pytest.raises(ValueError, match="possible"):
        Permutation(n, key=0)


@pytest.mark.parametrize("index", [-1, 10, 100])
def test_other_indices_are_refused(index: int):
    with pytest.raises(IndexError):
        Permutation(10, key=0)(index)


@pytest.mark.parametrize("n", [3, 24, 25, 71, 1000])
@pytest.mark.parametrize("tweaked", [False, True])
def test_any_place_of_a_permutation_is_uniform_over_keys(n: int, tweaked: bool):
    bits = np.random.default_rng(0).integers(0, 2**64, 6000, dtype=np.uint64).tolist()
    drawn = [Permutation(n, 5, bits[key]) if tweaked else Permutation(n, key) for key in range(6000)]
    places = (0, n // 2, n - 1)
    images = np.array([[permutation(place) for place in places] for permutation in drawn])
    for index, place in enumerate(places):
        assert chisquare(np.bincount(images[:, index], minlength=n)).pvalue > 1e-4, place
    if n == 25:  # the smallest of which no table is made: pairs of places too
        pairs = images[:, 0] * n + images[:, 2]
        wanted = np.array([0.0 if pair // n == pair % n else 6000 / (n * n - n) for pair in range(n * n)])
        counts = np.bincount(pairs, minlength=n * n)
        assert chisquare(counts[wanted > 0], wanted[wanted > 0]).pvalue > 1e-4


def test_all_permutations_of_few_items_occur_equally_often():
    counts = dict.fromkeys(permutations(range(4)), 0)
    for key in range(4800):
        permutation = Permutation(4, key)
        counts[tuple(permutation(i) for i in range(4))] += 1
    assert chisquare(list(counts.values())).pvalue > 1e-4


def test_neighbours_are_independent():
    n, permutation = 50_000, Permutation(50_000, key=3)
    images = np.array([permutation(i) for i in range(n)])
    steps = np.diff(images) % n
    assert kstest(steps / n, "uniform").pvalue > 1e-3
    for lag in (1, 2, 223, 224):  # 224: the side of the square in which the network works
        assert abs(np.corrcoef(images[lag:], images[:-lag])[0, 1]) < 0.02
    assert abs(np.corrcoef(images, np.arange(n))[0, 1]) < 0.02


def test_keys_give_unrelated_permutations():
    first, second = ([Permutation(10_000, key)(i) for i in range(2000)] for key in (7, 8))
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 8


def test_seeds_depend_on_every_part_its_type_and_their_borders():
    parts = [(1, 23), (12, 3), (23, 1), ("1", 23), (1,), ("a", "b"), ("ab",)]
    seeds = [derive_seed(*each) for each in parts]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed("order", 0, 1) == 931848080764223872  # the same on every machine and in every version


WINDOWS = [(None, 1), (1, 1), (1, 7), (2, 7), (3, 10), (5, 1), (4, 25), (100, 100), (1, 1000)]


@pytest.mark.parametrize("count", [1, 2, 97, 100, 101])
@pytest.mark.parametrize(("window", "block"), WINDOWS)
def test_every_epoch_sees_every_row_once(count: int, window: int | None, block: int):
    order = Order(count, seed=1, window=window, block=block)
    for epoch in range(4):
        positions = range(epoch * count, (epoch + 1) * count)
        assert {order.epoch(position) for position in positions} == {epoch}
        assert sorted(order.sample(position) for position in positions) == list(range(count))


@pytest.mark.parametrize("window", [None, 4])
def test_epochs_and_seeds_differ(window: int | None):
    seen = [
        tuple(Order(1000, seed, window, block=10).sample(epoch * 1000 + i) for i in range(1000))
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    ]
    matches = [sum(x == y for x, y in zip(a, b, strict=True)) for a, b in pairwise(seen)]
    assert len(set(seen)) == 6
    assert max(matches) < 15


def test_a_window_keeps_reads_in_few_blocks_and_mixes_them():
    order = Order(100_003, seed=2, window=8, block=500)
    rows = np.array([order.sample(position) for position in range(100_003)])
    stretches = [np.unique(rows[start : start + 500] // 500) for start in range(0, 100_000, 500)]
    assert max(len(blocks) for blocks in stretches) <= 2 * (8 + 2)  # a stretch may meet two runs
    assert np.median([len(blocks) for blocks in stretches]) >= 8
    assert len({int(block) for blocks in stretches[:40] for block in blocks}) > 30  # blocks from all over
    assert kstest(rows[:4000] / 100_003, "uniform").statistic < 0.4


def test_the_bounds_of_runs_and_the_place_of_the_tail_move():
    order = Order(1003, seed=2, window=5, block=50)
    tails = [[i for i in range(1003) if order.sample(epoch * 1003 + i) >= 1000] for epoch in range(8)]
    assert np.ptp([np.mean(places) for places in tails]) > 300


def test_the_order_stays_the_same_from_version_to_version():
    """Else a run that continues after an update would meet some pictures twice in an epoch."""
    plain, windowed = Order(1000, 0), Order(100_003, 0, 8, 500)
    assert [plain.sample(p) for p in (0, 1, 999, 1000, 10**6)] == [339, 741, 35, 527, 572]
    assert [windowed.sample(p) for p in (0, 1, 99_999, 10**9)] == [7393, 7180, 42069, 4532]


def test_any_access_gives_what_going_through_gives():
    order = Order(5003, seed=9, window=3, block=100)
    through = [order.sample(position) for position in range(15_009)]
    copy = pickle.loads(pickle.dumps(order))
    for position in np.random.default_rng(0).permutation(15_009)[:3000]:
        assert copy.sample(int(position)) == through[position]


@pytest.mark.parametrize("count", [1, 2, 5, 300])
def test_replacements_go_through_all_other_rows(count: int):
    order = Order(count, seed=3)
    for position in (0, 7, 12_345):
        rows = [order.replacement(position, attempt) for attempt in range(max(1, count - 1))]
        failed = order.sample(position)
        assert set(rows) == (set(range(count)) - {failed} or {failed})
        assert rows == [Order(count, seed=3).replacement(position, attempt) for attempt in range(len(rows))]
    if count == 300:
        assert order.replacement(0, 0) != order.replacement(300, 0)


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("count", [10**5, LARGEST])
def test_a_sample_costs_the_same_anywhere_and_no_memory(count: int, window: int | None):
    order = Order(count, seed=4, window=window, block=1000)
    anywhere = np.random.default_rng(1).integers(0, count * 1000, 20_000).tolist()  # of a thousand epochs
    for positions in (range(20_000), anywhere):
        assert cost(order, positions) < 60
    assert len(pickle.dumps(order)) < 2000


def test_impossible_orders_are_refused():
    for count, window, block in ((0, None, 1), (5, 0, 1), (5, 1, 0)):
        with pytest.raises(ValueError, match="at least"):
            Order(count, 0, window, block)
    with pytest.raises(IndexError, match="before the start"):
        Order(5, 0).sample(-1)
