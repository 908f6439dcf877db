"""Candidate pairs, in pieces that are done or not done: a block of queries against all others.

Both sides of a search leave their pairs in the same pieces, `search/NNNNN.parquet`, sorted: hashes a few bits
apart, and nearest neighbours by embedding. `gathered` reads them a range of rows at a time, so that what is
held does not grow with their number.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from curation.config import NearConfig, SearchConfig
from curation.hashes import HashTable
from dinov2.console import progress
from dinov2.files import write_table

if TYPE_CHECKING:
    from dinov2.neighbours import Searcher

Rows = NDArray[np.int64]
Hashes = NDArray[np.uint64]

BLOCK = 8192  # queries in a piece
ROW_GROUP = 65_536  # pairs that are read together
HELD = 64  # bytes that a pair takes while pieces are put together


@dataclass(frozen=True)
class Side:
    """A set to search with or in: the chosen rows of its embeddings, and their hashes."""

    vectors: Any  # features.Embeddings
    hashes: list[Hashes]  # of all rows
    chosen: Rows

    def __len__(self) -> int:
        return len(self.chosen)

    def selected(self) -> Any:
        """The chosen rows, read from the disk as they are asked for."""
        from dinov2.neighbours import Selected  # imported here: it brings torch

        return Selected(self.vectors, self.chosen)


@dataclass(frozen=True)
class Job:
    """A search of `queries` in `base`; their pairs are (query, base), or (base, query) if `turned`."""

    queries: Side
    base: Side
    folder: Path  # of the index, if there is one
    inside: bool  # queries and base are the same; pairs have the lower row first
    turned: bool = False

    def blocks(self) -> list[slice]:
        starts = range(0, len(self.queries), BLOCK)
        return [slice(start, min(start + BLOCK, len(self.queries))) for start in starts]


def jobs(first: Side, second: Side | None, folder: Path) -> list[Job]:
    """What is searched to find pairs among `first`, or between it and `second`."""
    if second is None:
        return [Job(first, first, folder / "index", inside=True)]
    return [
        Job(first, second, folder / "index-second", inside=False),
        Job(second, first, folder / "index-first", inside=False, turned=True),
    ]


def piece_of(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.parquet"


def search_pieces(
    jobs: list[Job], wanted: list[int], folder: Path, near: NearConfig, settings: SearchConfig, what: str
) -> None:
    """Search the pieces with these numbers, counted through the blocks of all jobs."""
    first = 0
    with progress(total=len(wanted) * BLOCK, what=what, unit="picture") as bar:
        for job in jobs:
            blocks = job.blocks()
            mine = [number for number in wanted if first <= number < first + len(blocks)]
            if mine:
                for number in _search(job, mine, first, folder, near, settings):
                    bar.update(BLOCK if number >= 0 else 0)
            first += len(blocks)


def searcher(settings: SearchConfig, seed: int = 0) -> "Searcher":
    from dinov2.neighbours import Searcher  # imported here: it brings torch

    return Searcher(
        engine=settings.engine,
        memory_gib=settings.memory_gib,
        recall=settings.recall,
        floor=settings.floor,
        kind=settings.index,
        seed=seed,
    )


def prepare(jobs: list[Job], settings: SearchConfig) -> list[dict[str, Any]]:
    """Build the indexes that are wanted; returns the engine of each job, and its recall."""
    how = searcher(settings)
    return [
        how.prepare(job.queries.selected(), job.base.selected(), job.folder, inside=job.inside)
        for job in jobs
        if len(job.queries) and len(job.base)
    ]


def _search(
    job: Job, wanted: list[int], first: int, folder: Path, near: NearConfig, settings: SearchConfig
) -> Iterator[int]:
    tables = (
        []
        if job.turned
        else [HashTable(each[job.base.chosen], near.hash_distance) for each in job.base.hashes]
    )
    blocks = [job.blocks()[number - first] for number in wanted]
    found = searcher(settings).search(
        job.queries.selected(), job.base.selected(), near.k, job.folder, blocks, inside=job.inside
    )
    for number, (block, (similarity, index)) in zip(wanted, found, strict=True):
        rows = job.queries.chosen[block]
        similarity, index = similarity.numpy(), index.numpy()
        close = similarity >= near.cosine
        close[:, : near.always] = True
        a, place = np.nonzero(close & (index >= 0))
        pairs = [(rows[a], job.base.chosen[index[a, place]])]
        for table, hashes in zip(tables, job.queries.hashes, strict=False):
            pairs += [(rows[a], job.base.chosen[b]) for a, b in table.near(hashes[rows])]
        write_table(piece_of(folder, number), _table(pairs, job))
        yield number


def _table(pairs: list[tuple[Rows, Rows]], job: Job) -> pa.Table:
    both = np.concatenate([np.stack(pair, axis=1) for pair in pairs])
    if job.turned:
        both = both[:, ::-1]
    if job.inside:
        both = np.sort(both[both[:, 0] != both[:, 1]], axis=1)
    both = once(both)
    return pa.table({"a": both[:, 0].copy(), "b": both[:, 1].copy()})


def once(pairs: Rows) -> Rows:
    """Each pair once, sorted."""
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    fresh = np.ones(len(pairs), bool)
    fresh[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
    return pairs[fresh]


def gathered(folder: Path, count: int, memory_gib: float) -> Iterator[Rows]:
    """[p, 2] the pairs of all pieces, each once, sorted, a range of first rows (of `count`) at a time."""
    paths = sorted(folder.glob("[0-9]*.parquet"))
    total = sum(parquet.read_metadata(path).num_rows for path in paths)
    ranges = max(1, -(-total * HELD // int(memory_gib * 2**30)))
    step = max(1, -(-count // ranges))
    for low in range(0, max(count, 1), step):
        inside = [("a", ">=", low), ("a", "<", low + step)]
        tables = [parquet.read_table(path, filters=inside) for path in paths]
        pairs = [np.stack([table["a"].to_numpy(), table["b"].to_numpy()], axis=1) for table in tables]
        yield once(np.concatenate([np.zeros((0, 2), np.int64), *pairs]))
