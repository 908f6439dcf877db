"""Exact nearest neighbours by inner product.

The base is read in tiles and never held whole in float32, so it may be a memory map of fp16 rows. All ways
find the same neighbours: each only proposes a short list, whose similarities are then computed again in
float64. From a large base a CPU that multiplies bfloat16 proposes in that, whose products take a half to a
third of the time. A query whose last places are uncertain within bfloat16's rounding is searched in float32,
and one whose last places are uncertain within float32's in float64.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dinov2.neighbours import keys
from dinov2.neighbours.rows import Rows, take, tile
from dinov2.neighbours.shortlist import BLOCK, ShortList, Wanted

Found = tuple[Float[Tensor, "queries k"], Int[Tensor, "queries k"]]

Propose = Callable[[ShortList, Tensor, Tensor, int, Tensor | None], None]

TILES = 8  # of queries, that a tile of the base is read for
COARSE_FROM = 2**15  # rows of the base, from which bfloat16 saves more than it costs
COARSE_FAILS = 0.25  # share of queries that it leaves uncertain, above which it saves nothing


@torch.no_grad()
def nearest(
    queries: Rows,
    base: Rows,
    k: int,
    *,
    backend: str = "auto",
    exclude_self: bool = False,
    first: int = 0,
    least: float = -np.inf,
    always: int = 0,
    memory_gb: float = 1.0,
    device: torch.device | str | None = None,
) -> Found:
    """The k rows of `base` with the largest inner product with each query, best first, ties by lower index.

    Args:
        queries: [n, dim]; the inner product is the cosine where both sides are L2-normalised.
        base: [m, dim].
        k: clipped to the rows there are, so a small base gives fewer columns.
        backend: "torch", "faiss" (faiss-cpu or faiss-gpu must be installed) or "auto". The results are equal.
        exclude_self: query i is row `first` + i of the base, which is left out of its own neighbours.
        least, always: neighbours less similar than this, beyond so many, are left out: -1, with a similarity
            of minus infinity. That saves what it takes to rank them.
        memory_gb: bound on what is held besides the arguments and the result.
        device: where the products are computed; by default where `queries` lies.

    Returns:
        similarity float32 [n, k] and index int64 [n, k], on `device` (for Apple's mps, on the CPU).

    Raises:
        ValueError: the dimensions differ, or a row holds NaN or infinity.
    """
    if queries.shape[1] != base.shape[1]:
        raise ValueError(f"queries have {queries.shape[1]} dimensions, the base has {base.shape[1]}")
    if device is None:
        device = queries.device if isinstance(queries, Tensor) else "cpu"
    device = torch.device(device)
    if device.type == "mps":  # has no float64
        device = torch.device("cpu")
    k = max(0, min(k, len(base) - exclude_self))
    similarity = torch.empty(len(queries), k, device=device)
    index = torch.empty(len(queries), k, dtype=torch.int64, device=device)
    if index.numel() == 0:
        return similarity, index
    search = _Search(queries, base, device, backend, k, memory_gb, least, min(always, k))
    with _full_precision():
        for part in search.parts():
            some = tile(queries, part.start, part.stop - part.start, device)
            own = torch.arange(len(some), device=device) + first + part.start if exclude_self else None
            similarity[part], index[part] = search.settled(some, own)
    return similarity, index


@dataclass(frozen=True)
class _Products:
    """Inner products of one type.

    Attributes:
        error: a bound on how far one is from the true product.
        slack: neighbours proposed beyond k, so that such errors seldom leave the last places uncertain.
    """

    dtype: torch.dtype
    error: float
    slack: int


class _Search:
    """Neighbours of one tile of queries after another in one base."""

    def __init__(
        self,
        queries: Rows,
        base: Rows,
        device: torch.device,
        backend: str,
        k: int,
        memory_gb: float,
        least: float = -np.inf,
        always: int = 0,
    ) -> None:
        self.base, self.device, self.k, self.least, self.always = base, device, k, least, always
        self.queries = len(queries)
        by_faiss = _backend(backend) == "faiss"
        self.propose = self._by_faiss if by_faiss else self._by_product
        # Of the memory: at worst every similarity of a tile is a candidate, with its two coordinates.
        budget = int(memory_gb * 2**30)
        self.tall, self.columns = (1024, 4096) if device.type == "cpu" else (8192, 16384)
        while self.tall * self.columns * 50 > budget and self.columns > BLOCK:
            self.tall, self.columns = max(1, self.tall // 2), self.columns // 2
        self._buffers: dict[torch.dtype, Tensor] = {}
        coarse = not by_faiss and len(base) >= COARSE_FROM and _multiplies_bfloat16(device)
        self.types = list(_types(queries, base, self.columns, device, coarse))
        # Several tiles of queries meet each tile of the base: reading that takes a tenth of one product.
        a_query = 6 * base.shape[1] + 24 * (k + self.types[0].slack)
        self.rows = self.tall * max(1, min(TILES, budget // (8 * a_query * self.tall)))
        self.settled_pairs = max(1, min(2**18, budget // 32) // base.shape[1])  # near the cache

    def parts(self) -> Iterator[slice]:
        """Queries to be searched at a time: few at first, which show whether bfloat16 is of use."""
        start, rows = 0, self.tall if len(self.types) > 1 else self.rows
        while start < self.queries:
            yield slice(start, min(start + rows, self.queries))
            start, rows = start + rows, self.rows

    def settled(self, queries: Tensor, own: Tensor | None) -> Found:
        """The neighbours of these queries: proposed by the fastest type, decided in float64."""
        similarity = queries.new_full((len(queries), self.k), -torch.inf)
        index = torch.full(similarity.shape, -1, device=self.device)
        unsure = torch.arange(len(queries), device=self.device)
        for products in list(self.types):
            *found, sure = self._by(products, queries[unsure], None if own is None else own[unsure])
            similarity[unsure], index[unsure] = found
            unsure = unsure[~sure]
            if len(unsure) > COARSE_FAILS * len(queries) and products.dtype == torch.bfloat16:
                self.types.remove(products)
        if len(unsure):
            own = None if own is None else own[unsure]
            every = Wanted(self.k, torch.inf)
            exact = self._scan(queries[unsure].double(), own, self.k, self._by_product, every)
            similarity[unsure], index[unsure] = exact.value, exact.column
        left_out = similarity < self.least
        left_out[:, : self.always] = False
        return similarity.masked_fill_(left_out, -torch.inf), index.masked_fill_(left_out, -1)

    def _by(self, products: _Products, queries: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Similarity and index [queries, k] of what these products propose; whether none can be missing."""
        # Two products may both be wrong, in opposite directions.
        wanted = Wanted(self.k, torch.inf, 2 * products.error)
        if self.least > -torch.inf:
            wanted = Wanted(self.always, self.least - 2 * products.error, 2 * products.error)
        size = self.k + products.slack
        proposed = self._scan(queries.to(products.dtype), own, size, self.propose, wanted)
        similarity = queries.new_full((len(queries), self.k), -torch.inf)
        index = torch.full(similarity.shape, -1, device=self.device)
        value, column = proposed.value, proposed.column
        worth = value >= wanted.cut(value[:, wanted.last])[:, None]
        for rows, wide in self._alike(worth.sum(1)):
            found = ranked(queries[rows], self.base, column[rows, :wide], self.k)
            similarity[rows, : found[0].shape[1]], index[rows, : found[0].shape[1]] = found
        # What was not proposed is at most as similar as the last that was, but for its error.
        return similarity, index, ~worth[:, -1] | (similarity[:, -1] > value[:, -1] + products.error)

    def _alike(self, counts: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Queries of which about as many are to be ranked, as many as the cache holds at a time; how many."""
        rising, order = counts.sort(stable=True)
        start, wide = int((counts == 0).sum()), rising.tolist()
        while start < len(wide):
            most = wide[min(start + self.settled_pairs // wide[start], len(wide) - 1)]
            stop = min(start + max(1, self.settled_pairs // most), len(wide))
            yield order[start:stop], wide[stop - 1]
            start = stop

    def _scan(
        self, queries: Tensor, own: Tensor | None, size: int, propose: Propose, wanted: Wanted
    ) -> ShortList:
        best = ShortList.empty(len(queries), size, self.device, wanted)
        for first in range(0, len(self.base), self.columns):
            base = tile(self.base, first, self.columns, self.device).to(queries.dtype)
            for start in range(0, len(queries), self.tall):
                part = slice(start, start + self.tall)
                propose(best.part(part), queries[part], base, first, None if own is None else own[part])
        return best

    def _by_product(
        self, best: ShortList, queries: Tensor, base: Tensor, first: int, own: Tensor | None
    ) -> None:
        similarity = torch.mm(queries, base.T, out=self._buffer(queries.dtype, len(queries), len(base)))
        if queries.dtype != torch.float32:
            similarity = self._buffer(torch.float32, len(queries), len(base)).copy_(similarity)
        if own is not None:
            inside = ((own >= first) & (own < first + len(base))).nonzero()[:, 0]
            similarity[inside, own[inside] - first] = -torch.inf
        best.offer(similarity, first)

    def _buffer(self, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
        # One for all tiles: the system takes longer to give fresh memory than to fill it.
        if dtype not in self._buffers:
            self._buffers[dtype] = torch.empty(self.tall * self.columns, dtype=dtype, device=self.device)
        return self._buffers[dtype][: rows * columns].view(rows, columns)

    @staticmethod
    def _by_faiss(best: ShortList, queries: Tensor, base: Tensor, first: int, own: Tensor | None) -> None:
        import faiss

        size = min(best.size + (own is not None), len(base))
        value, column = faiss.knn(queries.cpu().numpy(), base.cpu().numpy(), size, faiss.METRIC_INNER_PRODUCT)
        values = torch.from_numpy(value).to(queries.device)
        columns = torch.from_numpy(column).to(queries.device) + first
        if own is not None:
            values = values.masked_fill(columns == own[:, None], -torch.inf)
        best.merge(torch.arange(len(queries), device=queries.device), columns, values)


def ranked(queries: Tensor, base: Rows, column: Tensor, k: int) -> Found:
    """The first k of each query's short list by similarity in float64, rounded to float32, then by index.

    Args:
        column: [queries, any] rows of the base; -1: no such row.
    """
    picked = take(base, column.clamp(min=0).flatten(), queries.device).view(*column.shape, -1)
    # No batched product: on a CPU that takes three times as long.
    similarity = (picked * queries.double().unsqueeze(1)).sum(2).float()  # each product in float64
    key = keys.sort(keys.pack(similarity.masked_fill(column < 0, -torch.inf), column))[:, :k]
    return keys.value_of(key), keys.column_of(key)


def _backend(name: str) -> str:
    if name not in ("auto", "torch", "faiss"):
        raise ValueError(f"backend={name!r}: choose from auto, faiss, torch")
    return "torch" if name == "auto" else name


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a CPU has instructions for that, without which it takes longer than float32."""
    has = getattr(torch.cpu, "get_capabilities", dict)()  # some torch before 2.13 may not tell
    return device.type == "cpu" and bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def _types(queries: Rows, base: Rows, step: int, device: torch.device, coarse: bool) -> Iterator[_Products]:
    """The types to propose by, the fastest first, with bounds on the error of any product of these rows.

    A sum of dim products is wrong by at most dim units of rounding times the norms (Higham, Accuracy and
    Stability of Numerical Algorithms, sec. 3.1). bfloat16 also rounds both factors, by how much is measured,
    and the result.
    """
    left, left_lost = _largest(queries, step, device, "queries", coarse)
    right, right_lost = _largest(base, step, device, "base", coarse)
    summed = (queries.shape[1] + 4) * 2.0**-24  # with the roundings of what it is compared with
    if coarse:
        lost = left_lost * right + (left + left_lost) * right_lost
        yield _Products(
            torch.bfloat16, lost + (summed + 2.0**-8) * (left * right + lost) + 2.0**-100, slack=64
        )
    yield _Products(torch.float32, summed * left * right, slack=16)


def _largest(rows: Rows, step: int, device: torch.device, name: str, coarse: bool) -> tuple[float, float]:
    """The largest norm of a row, and, if asked, of what bfloat16 leaves out of one."""
    norms, lost = [], []
    for start in range(0, len(rows), step):
        some = tile(rows, start, step, device)
        norms.append(some.norm(dim=1).max())
        if coarse:
            lost.append((some - some.bfloat16()).norm(dim=1).max())
    largest = float(torch.stack(norms).max())
    if not np.isfinite(largest):
        raise ValueError(f"a row of the {name} holds NaN or infinity")
    return largest, float(torch.stack(lost).max()) if coarse else 0.0


@contextmanager
def _full_precision() -> Iterator[None]:
    """float32 products in float32: with TF32, which training may have chosen, neighbours are approximate."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)
