"""Neighbours among more rows than every product can be taken of: FAISS proposes, the stored rows decide.

An inverted file (Sivic and Zisserman 2003) with product-quantised codes (Jégou et al. 2011) gives each query
a short list, whose similarities are then computed again from the rows themselves. The index lies on the disk
in shards that are searched in turn, so memory does not grow with the base. How many lists are probed follows
from the recall that is asked for: it is measured against exact search on a sample, for every index.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from dinov2.exits import NoProgress, UserError
from dinov2.files import read_json, write_bytes, write_json
from dinov2.neighbours.exact import Found, nearest, ranked
from dinov2.neighbours.rows import Rows, Selected, tile

EXACT_UP_TO = 10**12  # pairs of a query and a row of the base; at most an hour of two cores at 256 dimensions
MEASURED_AT = 10  # recall is of the ten nearest, the row itself left out
SAMPLE = 1000  # queries that it is measured on: half of them choose how many lists to probe
TRAINED_ON = 100  # rows for each list
LEAST_PROPOSED = 128  # rows ranked again; with 64 real descriptors lost 3% of the ten nearest
RANKED = 2**19  # numbers of stored rows at a time; more leave the cache and take three times as long
STANDSTILL = 0.002  # gain in recall under which twice the lists are not worth it
BLOCK = 8192  # queries at a time; never another number, so that their results do not depend on the memory

ON_THE_CPU = torch.device("cpu")


class Index:
    """A FAISS index of [n, dim] rows in a folder: `trained.faiss`, and its shards `00000.faiss` …"""

    def __init__(self, base: Rows, folder: Path, memory_gib: float) -> None:
        self.base, self.folder, self.memory = base, folder, int(memory_gib * 2**30)
        self.probes = 1
        self._loaded: dict[Path, Any] = {}

    @classmethod
    def build(
        cls, base: Rows, folder: Path, *, kind: str = "auto", memory_gib: float = 4.0, seed: int = 0
    ) -> "Index":
        """Train the index and add every row, as far as a killed process has not.

        Args:
            kind: a FAISS factory string with an IVF, such as "OPQ64,IVF65536,PQ64x4fs", or "auto": about
                the root of n lists, half a byte for four dimensions.
            memory_gib: a shard takes at most a quarter of it.

        Raises:
            UserError: FAISS is not installed, or does not know the kind.
        """
        faiss = _faiss()
        found = cls(base, folder, memory_gib)
        if not found._trained.exists():
            write_bytes(found._trained, faiss.serialize_index(_train(base, kind, seed)).tobytes())
        code = 16 + base.shape[1]  # bytes of a row: ids and at most one a dimension
        size = max(BLOCK, found.memory // (4 * code))
        for number, start in enumerate(range(0, len(base), size)):
            path = folder / f"{number:05d}.faiss"
            if not path.exists():
                shard = faiss.read_index(str(found._trained))
                for first in range(start, min(start + size, len(base)), BLOCK):
                    stop = min(first + BLOCK, start + size)
                    rows = tile(base, first, stop - first, ON_THE_CPU).numpy()
                    shard.add_with_ids(rows, np.arange(first, first + len(rows)))
                write_bytes(path, faiss.serialize_index(shard).tobytes())
        return found

    def search(self, queries: Tensor, k: int, *, own: NDArray[np.int64] | None = None) -> Found:
        """As `nearest` gives them, but some may be missing; then -1, with a similarity of minus infinity.

        Args:
            queries: float32 [n, dim], a few thousand.
            own: [n] row of each query in the base, to be left out.
        """
        proposed = max(LEAST_PROPOSED, 2 * k)
        value, column = (torch.zeros(len(queries), 0, dtype=kind) for kind in (torch.float32, torch.int64))
        for shard in self._shards():
            values, columns = shard.search(queries.numpy(), proposed)
            column = torch.cat([column, torch.from_numpy(columns)], dim=1)
            value = torch.cat([value, torch.from_numpy(values)], dim=1)
            value, order = value.sort(dim=1, descending=True, stable=True)
            value, column = value[:, :proposed], column.gather(1, order)[:, :proposed]
        if own is not None:
            column = column.masked_fill(column == torch.from_numpy(own)[:, None], -1)
        some = max(1, RANKED // column.shape[1] // self.base.shape[1])
        parts = [ranked(queries[at], self.base, column[at], k) for at in _slices(len(queries), some)]
        similarity, index = (torch.cat(part) for part in zip(*parts, strict=True))
        return similarity, index

    def tune(self, queries: Rows, *, recall: float, floor: float, seed: int, inside: bool) -> dict[str, Any]:
        """Choose the fewest lists to probe that reach `recall` on a sample; measure it on another.

        Fewer, from `floor` on, if twice as many find nothing more: codes are too coarse for `recall`.

        Args:
            inside: query i is row i of the base.

        Raises:
            NoProgress: the recall is under `floor` even where every list is probed.
        """
        path = self.folder / "recall.json"
        if not path.exists():
            generator = np.random.default_rng([seed, 1])
            sample = generator.choice(len(queries), min(SAMPLE, len(queries)), replace=False)
            vectors = tile(Selected(queries, sample), 0, len(sample), ON_THE_CPU)
            truth = self._truth(vectors, sample if inside else None)
            write_json(path, self._tuned(vectors, truth, sample if inside else None, recall, floor))
        found = read_json(path)
        if found["recall"] < floor:
            raise NoProgress(
                f"the index finds {found['recall']:.1%} of the {MEASURED_AT} nearest neighbours, less than "
                f"search.floor={floor}; give codes more bytes, as in search.index=IVF1024,SQ8, or set "
                "search.engine=exact"
            )
        self.probes = found["probes"]
        return found

    def _truth(self, vectors: Tensor, own: NDArray[np.int64] | None) -> Int[Tensor, "n ten"]:
        memory = self.memory / 2**31
        index = nearest(vectors, self.base, MEASURED_AT + (own is not None), memory_gb=memory)[1]
        if own is None:
            return index
        # Its own row last, if it is there: of more than ten equal rows it may be missing.
        mine = index == torch.from_numpy(own)[:, None]
        return index.gather(1, mine.int().sort(dim=1, stable=True)[1])[:, :MEASURED_AT]

    def _tuned(
        self, vectors: Tensor, truth: Tensor, own: NDArray[np.int64] | None, wanted: float, floor: float
    ) -> dict[str, Any]:
        half, lists, hits = (len(vectors) + 1) // 2, self.lists(), torch.zeros(0)
        rising: list[float] = []
        for self.probes in _rising(lists):
            _, index = self.search(vectors, MEASURED_AT, own=own)
            hits = _hits(index, truth)
            rising.append(float(hits[:half].mean()))
            gains = len(rising) < 3 or rising[-1] >= rising[-3] + STANDSTILL  # over half as many lists
            if rising[-1] >= wanted or (rising[-1] >= floor and not gains):
                break
        measured = float((hits[half:] if len(hits) > half else hits).mean())
        return {"recall": round(measured, 4), "at": MEASURED_AT, "probes": self.probes, "lists": lists}

    def lists(self) -> int:
        faiss = _faiss()
        return int(faiss.extract_index_ivf(faiss.read_index(str(self._trained))).nlist)

    @property
    def _trained(self) -> Path:
        return self.folder / "trained.faiss"

    def _shards(self) -> Iterator[Any]:
        """The shards in turn; kept where all take no more than half of the memory."""
        faiss = _faiss()
        paths = sorted(self.folder.glob("[0-9]*.faiss"))
        keep = sum(path.stat().st_size for path in paths) <= self.memory // 2
        for path in paths:
            shard = self._loaded.get(path) or faiss.read_index(str(path))
            if keep:
                self._loaded[path] = shard
            faiss.extract_index_ivf(shard).nprobe = self.probes
            yield shard


@dataclass(frozen=True)
class Searcher:
    """The neighbours of queries in a base, BLOCK queries at a time, by the engine that suits their number.

    Attributes:
        engine: "exact", "ivf" or "auto".
        recall: of the ten nearest, aimed at; floor: under which a search stops. Exact search finds all.
        kind: see `Index.build`.
        device: where exact search computes; what is found lies on the CPU.
    """

    engine: str = "auto"
    memory_gib: float = 4.0
    recall: float = 0.97
    floor: float = 0.95
    kind: str = "auto"
    seed: int = 0
    device: torch.device = ON_THE_CPU

    def chosen(self, queries: Rows, base: Rows) -> str:
        """Raises UserError for an engine that there is not."""
        if self.engine not in ("auto", "exact", "ivf"):
            raise UserError(f"search.engine={self.engine}: choose from auto, exact, ivf")
        if self.engine != "auto":
            return self.engine
        small = len(queries) * len(base) <= EXACT_UP_TO or importlib.util.find_spec("faiss") is None
        return "exact" if small else "ivf"

    def prepare(self, queries: Rows, base: Rows, folder: Path, *, inside: bool = False) -> dict[str, Any]:
        """Make what searching needs, in `folder`; what is there stays. Returns the engine and its recall."""
        if self.chosen(queries, base) == "exact":
            return {"engine": "exact", "recall": 1.0}
        index = Index.build(base, folder, kind=self.kind, memory_gib=self.memory_gib, seed=self.seed)
        return {"engine": "ivf", **self._tuned(index, queries, inside)}

    def blocks(self, count: int) -> list[slice]:
        return list(_slices(count, BLOCK))

    def search(
        self,
        queries: Rows,
        base: Rows,
        k: int,
        folder: Path,
        blocks: list[slice],
        *,
        inside: bool = False,
        least: float = -np.inf,
        always: int = 0,
    ) -> Iterator[tuple[slice, Found]]:
        """The neighbours of these blocks of queries, after `prepare`; a missing one is -1.

        Args:
            inside: query i is row i of the base, and not its own neighbour.
            least, always: neighbours less similar than this, beyond so many, may be missing.
        """
        if self.chosen(queries, base) == "exact":
            for block in blocks:
                some = tile(queries, block.start, block.stop - block.start, ON_THE_CPU)
                found = nearest(
                    some,
                    base,
                    k,
                    exclude_self=inside,
                    first=block.start,
                    least=least,
                    always=always,
                    memory_gb=self.memory_gib / 2,
                    device=self.device,
                )
                yield block, (found[0].cpu(), found[1].cpu())
            return
        index = Index(base, folder, self.memory_gib)
        self._tuned(index, queries, inside)
        for block in blocks:
            own = np.arange(block.start, block.stop) if inside else None
            some = tile(queries, block.start, block.stop - block.start, ON_THE_CPU)
            yield block, index.search(some, k, own=own)

    def _tuned(self, index: Index, queries: Rows, inside: bool) -> dict[str, Any]:
        return index.tune(queries, recall=self.recall, floor=self.floor, seed=self.seed, inside=inside)


def _train(base: Rows, kind: str, seed: int) -> Any:
    faiss = _faiss()
    lists = 1 << max(0, round(np.log2(max(1, len(base))) / 2))
    if kind == "auto":
        code = f"PQ{base.shape[1] // 4}x4fs" if base.shape[1] % 8 == 0 else "SQ8"
        kind = f"IVF{lists},{code}"
    try:
        index = faiss.index_factory(base.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
        lists = int(faiss.extract_index_ivf(index).nlist)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"search.index={kind} is no FAISS index with an IVF: {reason}") from None
    generator = np.random.default_rng([seed, 0])
    sample = np.unique(generator.integers(len(base), size=max(4096, TRAINED_ON * lists)))
    index.train(tile(Selected(base, sample), 0, len(sample), ON_THE_CPU).numpy())
    return index


def _hits(index: Tensor, truth: Tensor) -> Tensor:
    """[n] share of the true neighbours that were found."""
    return (index[:, :, None] == truth[:, None, :]).any(1).float().mean(1)


def _rising(last: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, 16 … and the last."""
    step = 1
    while step < last:
        yield step
        if step > 1 and step * 3 // 2 < last:
            yield step * 3 // 2
        step *= 2
    yield last


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(at, min(at + size, count)) for at in range(0, count, size))


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise UserError("search.engine=ivf needs FAISS: install faiss-cpu or faiss-gpu") from None
    return faiss
