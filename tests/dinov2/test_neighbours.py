"""Neighbours are exact whatever the backend, tiles, types and ties; the vote equals scikit-learn's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch.nn.functional import normalize

from dinov2.neighbours import exact, keys, knn_classify, nearest

BACKENDS = ["torch", pytest.param("torch", id="bfloat16"), "faiss"]


@pytest.fixture(autouse=True)
def as_named(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "faiss" in request.node.name:
        pytest.importorskip("faiss", reason="neither faiss-cpu nor faiss-gpu is installed")
    if "bfloat16" in request.node.name:  # also for few rows, and where it has to be emulated
        monkeypatch.setattr(exact, "COARSE_FROM", 0)
        monkeypatch.setattr(exact, "_multiplies_bfloat16", lambda device: True)


def by_sorting(queries, base, k, exclude_self=False):
    """The definition: every product in float64, rounded to float32, sorted by it and then by index."""
    similarity = (np.asarray(queries, np.float64) @ np.asarray(base, np.float64).T).astype(np.float32)
    if exclude_self:
        np.fill_diagonal(similarity, -np.inf)
    index = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, index, 1), index


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("memory_gb", [1.0, 0.005])
def test_neighbours_are_those_of_a_full_sort(backend, exclude_self, memory_gb):
    generator = torch.Generator().manual_seed(0)
    base = normalize(torch.randn(2000, 24, generator=generator), dim=1)
    queries = base if exclude_self else normalize(torch.randn(500, 24, generator=generator), dim=1)
    similarity, index = nearest(
        queries, base, 7, backend=backend, exclude_self=exclude_self, memory_gb=memory_gb
    )
    expected, order = by_sorting(queries, base, 7, exclude_self)
    assert np.array_equal(index, order)
    assert np.array_equal(similarity, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("copies", [3, 300])
def test_equal_rows_come_by_index_however_many(backend, copies):
    """Pools hold the same picture many times over; float32 products of equal rows differ in the last bit."""
    generator = torch.Generator().manual_seed(1)
    base = normalize(torch.randn(9, 50, generator=generator), dim=1).repeat(copies, 1)
    base = base[torch.randperm(len(base), generator=generator)]
    similarity, index = nearest(base, base, 20, backend=backend, exclude_self=True, memory_gb=0.05)
    expected, order = by_sorting(base, base, 20, exclude_self=True)
    assert np.array_equal(index, order)
    assert np.array_equal(similarity, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("always", [0, 4, 30])
def test_those_that_are_near_enough_are_found_and_the_first_always(backend, always):
    """Of some queries more rows than k are near enough, of others none; many are equal."""
    generator = torch.Generator().manual_seed(4)
    centre, spread = torch.randn(30, 16, generator=generator), torch.rand(30, 1, generator=generator)
    noise = torch.randn(1500, 16, generator=generator)
    base = normalize(centre.repeat_interleave(50, 0) + spread.repeat_interleave(50, 0) * noise, dim=1)
    base[:40] = base[0]
    base = base[torch.randperm(1500, generator=generator)]
    expected, order = by_sorting(base, base, 20, exclude_self=True)
    for least in (float(expected[7, 9]), 0.6, 1.1):  # one that a row has exactly
        similarity, index = nearest(
            base, base, 20, backend=backend, exclude_self=True, least=least, always=always
        )
        wanted = expected >= np.float32(least)
        wanted[:, :always] = True
        assert np.array_equal(index, np.where(wanted, order, -1))
        assert np.array_equal(similarity, np.where(wanted, expected, -np.inf))


def test_what_bfloat16_leaves_uncertain_is_searched_in_float32_and_float64(monkeypatch):
    """Three kinds of rows: far apart, as near as bfloat16 cannot tell, and as near as float32 cannot."""
    generator = torch.Generator().manual_seed(5)
    apart, centre = torch.randn(2000, 32, generator=generator), torch.randn(2, 1, 32, generator=generator)
    near = centre + torch.randn(2, 300, 32, generator=generator) * torch.tensor([3e-2, 1e-8])[:, None, None]
    base = normalize(torch.cat([apart, near.flatten(0, 1)]), dim=1)
    searched, scan = {}, exact._Search._scan

    def counted(self, queries, *rest):
        searched[queries.dtype] = searched.get(queries.dtype, 0) + len(queries)
        return scan(self, queries, *rest)

    monkeypatch.setattr(exact._Search, "_scan", counted)
    similarity, index = nearest(base, base, 20, exclude_self=True)
    expected, order = by_sorting(base, base, 20, exclude_self=True)
    assert np.array_equal(index, order)
    assert np.array_equal(similarity, expected)
    assert searched[torch.bfloat16] == 2600
    assert 300 <= searched[torch.float64] < 600 <= searched[torch.float32] < 900


def test_rows_that_bfloat16_rounds_down_throughout_are_found():
    """The worst case of its bound: all of a factor's entries are rounded down, and so is their product."""
    step, dim = 2.0**-7, 256  # from one number to the next

    def mixed(share: float, more: float) -> torch.Tensor:
        return torch.where(torch.arange(dim) < share * dim, 1 + step, 1.0) + more

    down = 0.499 * step
    best, good, poor = mixed(0.485, down), mixed(0.77, 0), mixed(0, 0)
    base = torch.stack([good] * 5 + [poor] * 100 + [best] * 5)
    assert best.bfloat16() @ torch.ones(dim).bfloat16() == poor.bfloat16() @ torch.ones(dim).bfloat16()
    _, index = nearest(mixed(0, down)[None], base, 5)
    assert index.tolist() == [list(range(105, 110))]


@pytest.mark.parametrize("order", ["ascending", "descending", "by class"])
def test_the_order_of_the_base_does_not_matter(order):
    """A sorted base defeats the filter that looks at few columns; it must stay right."""
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(6000, 4, generator=generator)
    if order == "by class":
        base = base / 20 + torch.randn(6, 4, generator=generator).repeat_interleave(1000, 0)
    else:
        base = base[base[:, 0].argsort(descending=order == "descending")]
    queries = torch.cat([torch.tensor([[1.0, 0, 0, 0]]), base[::1000]])
    similarity, index = nearest(queries, base, 30)
    expected, rows = by_sorting(queries, base, 30)
    assert np.array_equal(index, rows)
    assert np.array_equal(similarity, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_memory_map_of_fp16_rows_is_read_and_never_written(backend, tmp_path: Path):
    rows = np.random.default_rng(3).standard_normal((3000, 16)).astype(np.float16)
    np.save(tmp_path / "rows.npy", rows)
    base = np.load(tmp_path / "rows.npy", mmap_mode="r")
    queries = torch.from_numpy(rows[:10].copy())
    before = queries.clone()
    _, index = nearest(queries, base, 5, backend=backend)
    assert np.array_equal(index, by_sorting(rows[:10], rows, 5)[1])
    labels = torch.zeros(3000, dtype=torch.int64)
    knn_classify(base, labels, queries, classes=1, backend=backend)
    assert torch.equal(queries, before)
    assert np.array_equal(base, rows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_and_empty_bases_give_fewer_columns(backend):
    base = torch.eye(3)
    assert nearest(base, base, 10, backend=backend)[1].tolist() == [[0, 1, 2], [1, 0, 2], [2, 0, 1]]
    assert nearest(base, base, 10, backend=backend, exclude_self=True)[1].tolist() == [[1, 2], [0, 2], [0, 1]]
    assert nearest(base, base[:1], 2, backend=backend, exclude_self=True)[1].shape == (3, 0)
    assert nearest(base, base[:0], 2, backend=backend)[1].shape == (3, 0)
    assert nearest(base[:0], base, 2, backend=backend)[1].shape == (0, 2)


def test_rows_that_are_not_finite_are_refused():
    base = torch.eye(4)
    broken = base.clone()
    broken[2, 1] = torch.nan
    with pytest.raises(ValueError, match="a row of the base holds NaN"):
        nearest(base, broken, 2)
    with pytest.raises(ValueError, match="dimensions"):
        nearest(base, base[:, :3], 2)


@pytest.mark.parametrize("exclude_self", [False, True])
def test_a_search_leaves_the_precision_of_products_as_it_was(exclude_self):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        base = torch.randn(500, 64)
        _, index = nearest(base, base, 3, exclude_self=exclude_self)
        assert np.array_equal(index, by_sorting(base, base, 3, exclude_self)[1])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_vote_equals_scikit_learns(backend):
    generator = torch.Generator().manual_seed(4)
    centres = torch.randn(7, 12, generator=generator)
    labels = torch.randint(7, (600,), generator=generator)
    train = centres[labels] + 1.5 * torch.randn(600, 12, generator=generator)
    test = centres.repeat(40, 1) + 1.5 * torch.randn(280, 12, generator=generator)
    answers = knn_classify(train, labels, test, classes=7, k=(200, 1, 10, 20, 601), backend=backend)
    assert list(answers) == [1, 10, 20, 200]
    for k, answer in answers.items():
        reference = KNeighborsClassifier(
            n_neighbors=k,
            metric="cosine",
            algorithm="brute",
            weights=lambda d: np.exp((1 - d) / 0.07),  # pyright: ignore[reportArgumentType]  # a callable is documented
        ).fit(train.double().numpy(), labels.numpy())
        assert np.array_equal(answer, reference.predict(test.double().numpy()))


def test_where_every_k_is_too_large_all_rows_vote():
    train = torch.tensor([[1.0, 0], [0, 1], [0.1, 1]])
    answers = knn_classify(train, torch.tensor([0, 1, 1]), train, classes=2, k=(10, 20))
    assert list(answers) == [3]
    assert answers[3].tolist() == [0, 1, 1]


@pytest.mark.parametrize("threads", [1, keys.FEW_THREADS + 1])
def test_keys_sort_by_value_and_then_by_column(threads):
    random = np.random.default_rng(0)
    value = random.normal(size=(5, 300)).astype(np.float32).round(1)  # many ties
    value[:, :6] = [0.0, -0.0, -np.inf, 3e38, -1e-44, 1e-44]
    column = np.stack([random.permutation(2**32 - 2 - np.arange(300)) for _ in range(5)])
    column[:, 2] = keys.NONE
    column[:, 9] = 0
    order = np.lexsort((column, -value))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # on which it depends how they are sorted
    found = keys.sort(keys.pack(torch.from_numpy(value), torch.from_numpy(column)))
    torch.set_num_threads(before)
    assert np.array_equal(keys.column_of(found), np.take_along_axis(column, order, 1))
    assert np.array_equal(keys.value_of(found), np.take_along_axis(value, order, 1))
