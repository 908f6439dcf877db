"""Exact nearest neighbours by inner product.

The base is read in tiles and never held whole in float32, so it may be a memory map of fp16 rows. Both
backends find the same neighbours: each only proposes a short list, whose similarities are then computed again
in float64. A query whose last places are uncertain within float32's rounding is searched in float64.
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

Found = tuple[Float[Tensor, "queries k"], Int[Tensor, "queries k"]]

Propose = Callable[["_ShortList", Tensor, Tensor, int, Tensor | None], None]

SLACK = 16  # neighbours proposed beyond k, so that rounding seldom leaves the last places uncertain
TILES = 8  # of queries, that a tile of the base is read for
BLOCK = 64  # similarities whose maximum is looked at before each is


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
    search = _Search(base, device, backend, k, memory_gb, least, min(always, k))
    rounding = _rounding(queries, base, search.columns, device)
    with _full_precision():
        for start in range(0, len(queries), search.rows):
            some = tile(queries, start, search.rows, device)
            own = torch.arange(len(some), device=device) + first + start if exclude_self else None
            part = slice(start, start + len(some))
            similarity[part], index[part] = search.settled(some, own, rounding)
    return similarity, index


class _Search:
    """Neighbours of one tile of queries after another in one base."""

    def __init__(
        self,
        base: Rows,
        device: torch.device,
        backend: str,
        k: int,
        memory_gb: float,
        least: float = -np.inf,
        always: int = 0,
    ) -> None:
        self.base, self.device, self.k, self.least, self.always = base, device, k, least, always
        self.propose = self._by_faiss if _backend(backend) == "faiss" else self._by_product
        # Of the memory: at worst every similarity of a tile is a candidate, with its two coordinates.
        budget = int(memory_gb * 2**30)
        self.tall, self.columns = (1024, 4096) if device.type == "cpu" else (8192, 16384)
        while self.tall * self.columns * 48 > budget and self.columns > BLOCK:
            self.tall, self.columns = max(1, self.tall // 2), self.columns // 2
        self._buffer = torch.empty(self.tall * self.columns, device=device)
        # Several tiles of queries meet each tile of the base: reading that takes a tenth of one product.
        a_query = 4 * base.shape[1] + 24 * (k + SLACK)
        self.rows = self.tall * max(1, min(TILES, budget // (8 * a_query * self.tall)))
        self.settled_pairs = max(1, min(2**18, budget // 32) // base.shape[1])  # near the cache

    def settled(self, queries: Tensor, own: Tensor | None, rounding: float) -> Found:
        """The neighbours of these queries: proposed in float32, decided in float64."""
        size = self.k + SLACK
        wanted = _Wanted(size, torch.inf)
        if self.least > -torch.inf:
            wanted = _Wanted(self.always, self.least - rounding, rounding)
        proposed = self._scan(queries, own, size, self.propose, wanted)
        similarity = queries.new_full((len(queries), self.k), -torch.inf)
        index = torch.full(similarity.shape, -1, device=self.device)
        worth = proposed.value >= wanted.cut(proposed.value[:, wanted.last])[:, None]
        for rows, wide in self._alike(worth.sum(1)):
            found = ranked(queries[rows], self.base, proposed.column[rows, :wide], self.k)
            similarity[rows, : found[0].shape[1]], index[rows, : found[0].shape[1]] = found
        # What was not proposed is at most as similar as the last that was, but for rounding.
        last = proposed.value[:, -1]
        uncertain = (worth[:, -1] & (similarity[:, -1] <= last + rounding)).nonzero()[:, 0]
        if len(uncertain):
            own = None if own is None else own[uncertain]
            double, every = queries[uncertain].double(), _Wanted(self.k, torch.inf)
            exact = self._scan(double, own, self.k, self._by_product, every)
            similarity[uncertain], index[uncertain] = exact.value, exact.column
        left_out = similarity < self.least
        left_out[:, : self.always] = False
        return similarity.masked_fill_(left_out, -torch.inf), index.masked_fill_(left_out, -1)

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
        self, queries: Tensor, own: Tensor | None, size: int, propose: Propose, wanted: "_Wanted"
    ) -> "_ShortList":
        best = _ShortList.empty(len(queries), size, self.device, wanted)
        for first in range(0, len(self.base), self.columns):
            base = tile(self.base, first, self.columns, self.device)
            for start in range(0, len(queries), self.tall):
                part = slice(start, start + self.tall)
                propose(best.part(part), queries[part], base, first, None if own is None else own[part])
        return best

    def _by_product(
        self, best: "_ShortList", queries: Tensor, base: Tensor, first: int, own: Tensor | None
    ) -> None:
        if queries.dtype == torch.float32:
            # One buffer for all tiles: the system takes longer to give fresh memory than to fill it.
            out = self._buffer[: len(queries) * len(base)].view(len(queries), len(base))
            similarity = torch.mm(queries, base.T, out=out)
        else:
            similarity = (queries @ base.to(queries.dtype).T).float()
        if own is not None:
            inside = ((own >= first) & (own < first + len(base))).nonzero()[:, 0]
            similarity[inside, own[inside] - first] = -torch.inf
        best.offer(similarity, first)

    @staticmethod
    def _by_faiss(best: "_ShortList", queries: Tensor, base: Tensor, first: int, own: Tensor | None) -> None:
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


@dataclass(frozen=True)
class _Wanted:
    """What a list has to hold: values of at least `least`, and the first `always`, but for rounding."""

    always: int
    least: float
    rounding: float = 0.0

    @property
    def last(self) -> int:
        """The place of the last that is always wanted."""
        return max(0, self.always - 1)

    def cut(self, last: Float[Tensor, "queries"]) -> Float[Tensor, "queries"]:
        """Under which nothing is wanted, where at least this value is at the place `last`."""
        if not self.always:
            return torch.full_like(last, self.least)
        return (last - self.rounding).clamp(max=self.least)


class _ShortList:
    """For each query the `size` best columns offered so far that are wanted, the best first, as `keys`."""

    def __init__(self, key: Int[Tensor, "queries size"], wanted: _Wanted) -> None:
        self.key, self.size, self.wanted = key, key.shape[1], wanted

    @classmethod
    def empty(cls, queries: int, size: int, device: torch.device, wanted: _Wanted) -> "_ShortList":
        return cls(_empty(queries, size, device), wanted)

    @property
    def value(self) -> Float[Tensor, "queries size"]:
        return keys.value_of(self.key)

    @property
    def column(self) -> Int[Tensor, "queries size"]:
        return keys.column_of(self.key)

    def part(self, queries: slice) -> "_ShortList":
        """The lists of these queries: what is offered to the part is in the whole."""
        return _ShortList(self.key[queries], self.wanted)

    def offer(self, similarity: Float[Tensor, "queries columns"], first: int) -> None:
        """Offer a whole tile whose first column is `first` of the base.

        A full top-k over every tile would cost as much as the products. Few columns beat what is already
        there, so the maximum of each block is compared first, and only blocks that may matter are opened.
        """
        last, always = keys.value_of(self.key[:, self.wanted.last]), self.wanted.last + 1
        threshold = keys.value_of(self.key[:, -1]).maximum(self.wanted.cut(last))
        width, unfilled = similarity.shape[1], bool(torch.isneginf(threshold).any())
        # A power of two divides most tiles, which then need not be copied to be padded. While lists are not
        # full there have to be more blocks than places.
        block = BLOCK if 4 * BLOCK * self.size < first else BLOCK // 2
        if unfilled:
            block = min(block, 1 << max(0, (width // (2 * always)).bit_length() - 1))
        if width % block:
            similarity = torch.nn.functional.pad(similarity, (0, block - width % block), value=-torch.inf)
        blocks = similarity.view(len(similarity), -1, block)
        highest = blocks.amax(2)
        if unfilled and highest.shape[1] >= always:
            # As many blocks as are wanted reach this value, so what is below it can not stay.
            least = self.wanted.cut(highest.topk(always, dim=1).values[:, -1])
            threshold = threshold.maximum(least.nextafter(least.new_tensor(-torch.inf)))
        which = (highest > threshold[:, None]).flatten().nonzero()[:, 0]
        row = which // highest.shape[1]
        opened = blocks.flatten(0, 1).index_select(0, which)
        place = (opened > threshold[row, None]).flatten().nonzero()[:, 0]
        inner = place // block
        row = row[inner]
        column = which[inner] * block + place % block - row * similarity.shape[1] + first
        self._insert(row, column, opened.flatten()[place])

    def merge(self, rows: Tensor, column: Tensor, value: Tensor) -> None:
        """Offer lists of columns for some rows: column and value [len(rows), any]."""
        self._merge(rows, keys.pack(value, column))

    def _merge(self, rows: Tensor, key: Tensor) -> None:
        self.key[rows] = keys.sort(torch.cat([self.key[rows], key], dim=1))[:, : self.size]

    def _insert(self, row: Tensor, column: Tensor, value: Tensor) -> None:
        """Offer single columns, in ascending order of their rows."""
        key = keys.pack(value, column)
        counts = torch.bincount(row, minlength=len(self.value))
        slot = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        few = counts <= self.size
        # Apart, because a list is as wide as its longest: neighbours of one class often lie together.
        for group in (few & (counts > 0), ~few):
            rows = group.nonzero()[:, 0]
            if len(rows) == 0:
                continue
            mine = group[row]
            place = (group.cumsum(0) - 1)[row[mine]], slot[mine]
            width = int(counts[rows].max())
            listed = _empty(len(rows), width, row.device)
            listed[place] = key[mine]
            self._merge(rows, listed)


def _empty(queries: int, places: int, device: torch.device) -> Int[Tensor, "queries places"]:
    """Keys that any column is better than."""
    nothing = keys.pack(torch.tensor(-torch.inf), torch.tensor(keys.NONE))
    return torch.full((queries, places), int(nothing), dtype=torch.int64, device=device)


def _backend(name: str) -> str:
    if name not in ("auto", "torch", "faiss"):
        raise ValueError(f"backend={name!r}: choose from auto, faiss, torch")
    return "torch" if name == "auto" else name


def _rounding(queries: Rows, base: Rows, step: int, device: torch.device) -> float:
    """Bound on the error of a float32 inner product of any query with any row of the base.

    dim units of rounding times the norms (Higham, Accuracy and Stability of Numerical Algorithms, sec. 3.1);
    twice, because both what was proposed and what was not are that uncertain.
    """
    largest = _largest_norm(queries, step, device, "queries") * _largest_norm(base, step, device, "base")
    return 2 * (queries.shape[1] + 2) * 2.0**-24 * largest


def _largest_norm(rows: Rows, step: int, device: torch.device, name: str) -> float:
    norms = [tile(rows, start, step, device).norm(dim=1).max() for start in range(0, len(rows), step)]
    largest = float(torch.stack(norms).max())
    if not np.isfinite(largest):
        raise ValueError(f"a row of the {name} holds NaN or infinity")
    return largest


@contextmanager
def _full_precision() -> Iterator[None]:
    """float32 products in float32: with TF32, which training may have chosen, neighbours are approximate."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)
