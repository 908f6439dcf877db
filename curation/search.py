"""Candidate pairs, in pieces that are done or not done: a block of queries against all others.

All that finds candidates leaves them in the same pieces, `search/NNNNN.parquet`, sorted: hashes a few bits
apart, nearest neighbours by embedding, both again for other views of the queries, and neighbours for windows
of them (`curation.views`). A candidate is a row of the first set, a row of the second, and the view.
`gathered` reads them a range of rows at a time, so that what is held does not grow with their number.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from curation.config import NearConfig, SearchConfig
from curation.hashes import HashTable
from curation.ingest import Stack
from curation.pieces import Workers
from curation.views import OF_FIRST, PAIRED, TILES, TURNS, UNDONE, WINDOWS, hashes
from dinov2.console import progress
from dinov2.files import write_table

if TYPE_CHECKING:
    from dinov2.neighbours import Searcher

Rows = NDArray[np.int64]
Hashes = NDArray[np.uint64]

BLOCK = 8192  # queries in a piece
ROW_GROUP = 65_536  # pairs that are read together
COLUMNS = ("a", "b", "view")
WORTH_A_PROCESS = 512  # rows of the base, beyond which it is worth one to look up hashes
ONE_PROCESS = 1 << 20  # up to which tables are made so fast that others than this one may make them
INDEXED = 16  # rows of the base from which there may be an index: a code of 4 bits is learnt from as many
TURNED_K = 8  # neighbours that a turned picture, or a window of one, may have
BLANK = 3.0  # spread of the luma, of 255 levels, of views that hash alike because there is nothing to see
HELD = 96  # bytes that a pair takes while pieces are put together


@dataclass(frozen=True)
class Side:
    """A set to search with or in: the chosen rows of its embeddings, and their hashes."""

    vectors: Callable[[], Any]  # opens features.Embeddings, or the like
    hashes: list[Hashes]  # of all rows
    thumbs: Stack
    turned: Callable[[int], Any] | None  # vectors in one of the TURNS, if the embedding knows them
    chosen: Rows
    cropped: Callable[[int], Any] | None = None  # vectors of one of the WINDOWS, likewise

    def __len__(self) -> int:
        return len(self.chosen)

    def in_view(self, view: int) -> "Side":
        """The same with the vectors of turned pictures."""
        assert self.turned is not None
        return dataclasses.replace(self, vectors=partial(self.turned, view))

    def in_window(self, window: int) -> "Side":
        """The same with the vectors of windows of pictures."""
        assert self.cropped is not None
        return dataclasses.replace(self, vectors=partial(self.cropped, window))

    def selected(self) -> Any:
        """The chosen rows, read from the disk as they are asked for."""
        from dinov2.neighbours import Selected  # imported here: it brings torch

        return Selected(self.vectors(), self.chosen)


@dataclass(frozen=True)
class Job:
    """A search of `queries` in `base`; their pairs are (query, base), or (base, query) if `swapped`."""

    queries: Side
    base: Side
    folder: Path  # of the index, if there is one
    inside: bool  # queries and base are the same; pairs have the lower row first
    swapped: bool = False
    view: int = 0  # of the queries, whose neighbours by embedding are looked for
    windows: bool = False  # the queries are windows
    views: Sequence[int] = ()  # of the queries, whose hashes are looked up too

    @property
    def more(self) -> bool:
        """Whether the queries' own vectors and hashes are the business of another search of the same base."""
        return self.view > 0 or self.windows

    def blocks(self) -> list[slice]:
        starts = range(0, len(self.queries), BLOCK)
        return [slice(start, min(start + BLOCK, len(self.queries))) for start in starts]


def jobs(first: Side, second: Side | None, folder: Path, near: NearConfig) -> list[Job]:
    """What is searched to find pairs among `first`, or between it and `second`."""
    if second is None:
        return with_views(Job(first, first, folder / "index", inside=True), PAIRED, near)
    ahead = Job(first, second, folder / "index-second", inside=False)
    back = Job(second, first, folder / "index-first", inside=False, swapped=True)
    # What is turned may be either; but of a collage and its part each may be the collage.
    ahead = dataclasses.replace(ahead, views=TILES if near.verify and near.views else ())
    return [ahead, *_windows(ahead, near), *with_views(back, TURNS, near)]


def with_views(job: Job, turns: Sequence[int], near: NearConfig) -> list[Job]:
    """A search, and what finds its queries turned and as a part of others, as far as that is wanted."""
    if near.verify and near.views:
        job = dataclasses.replace(job, views=(*turns, *TILES))
    if job.queries.turned is None:
        return [job]
    return [
        job,
        *(
            dataclasses.replace(job, queries=job.queries.in_view(turn), view=turn, views=())
            for turn in near.turns
            if turn in turns
        ),
        *_windows(job, near),
    ]


def _windows(job: Job, near: NearConfig) -> list[Job]:
    """Searches for what is like a window of a query."""
    if job.queries.cropped is None or not (near.verify and near.crops):
        return []
    return [
        dataclasses.replace(job, queries=job.queries.in_window(window), windows=True, views=())
        for window in range(len(WINDOWS))
    ]


def piece_of(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.parquet"


def search_pieces(
    jobs: list[Job],
    wanted: list[int],
    by_hash: Iterator[list[Rows]],
    folder: Path,
    near: NearConfig,
    settings: SearchConfig,
    what: str,
) -> None:
    """Search the pieces with these numbers, counted through the blocks of all jobs.

    Args:
        by_hash: of `look_up`, for the same pieces.
    """
    first = 0
    with progress(total=len(wanted) * BLOCK, what=what, unit="picture") as bar:
        for job in jobs:
            blocks = job.blocks()
            mine = [number for number in wanted if first <= number < first + len(blocks)]
            if mine:
                for number in _search(job, mine, first, by_hash, folder, near, settings):
                    bar.update(BLOCK if number >= 0 else 0)
            first += len(blocks)


def searcher(settings: SearchConfig, base: int) -> "Searcher":
    """What searches as the settings say in a base of so many rows."""
    from dinov2.neighbours import Searcher  # imported here: it brings torch
    from dinov2.parallel import pick_device

    return Searcher(
        engine="exact" if base < INDEXED else settings.engine,
        memory_gib=settings.memory_gib,
        recall=settings.recall,
        floor=settings.floor,
        kind=settings.index,
        device=pick_device(settings.device),
    )


def prepare(jobs: list[Job], settings: SearchConfig) -> list[dict[str, Any]]:
    """Build the indexes that are wanted; returns the engine of each, and its recall."""
    return [
        searcher(settings, len(job.base)).prepare(
            job.queries.selected(), job.base.selected(), job.folder, inside=job.inside
        )
        for job in jobs
        if len(job.queries) and len(job.base) and not job.more
    ]


def _search(
    job: Job,
    wanted: list[int],
    first: int,
    by_hash: Iterator[list[Rows]],
    folder: Path,
    near: NearConfig,
    settings: SearchConfig,
) -> Iterator[int]:
    k, least, always = (TURNED_K, near.turned_cosine, 0) if job.more else (near.k, near.cosine, near.always)
    blocks = [job.blocks()[number - first] for number in wanted]
    found = searcher(settings, len(job.base)).search(
        job.queries.selected(),
        job.base.selected(),
        k,
        job.folder,
        blocks,
        inside=job.inside,
        least=least,
        always=always,
    )
    for number, (block, (similarity, index)) in zip(wanted, found, strict=True):
        rows = job.queries.chosen[block]
        similarity, index = similarity.numpy(), index.numpy()
        close = similarity >= least
        close[:, :always] = True
        a, place = np.nonzero(close & (index >= 0))
        pairs = [_pairs(rows[a], job.base.chosen[index[a, place]], job.view, job), *next(by_hash)]
        table = once(np.concatenate(pairs))
        write_table(piece_of(folder, number), pa.table(dict(zip(COLUMNS, table.T.copy(), strict=True))))
        yield number


def look_up(
    jobs: list[Job], wanted: list[int], near: NearConfig, workers: Workers, what: str
) -> Iterator[list[Rows]]:
    """Pairs that hashes find, for each of these pieces.

    Until a pool is large, a process makes tables of its hashes anew for each piece, while this one imports
    torch and computes products; then they are made once, and in this process alone.
    """
    looks = [(ByHash(job, near), job.blocks()) for job in jobs]
    asked = [(each, block) for each, blocks in looks for block in blocks]
    asked = [asked[number] for number in wanted]
    if WORTH_A_PROCESS < max(len(job.base) for job in jobs) <= ONE_PROCESS:
        return workers.ahead(_looked_up, asked, what=what)
    return workers.here(_looked_up, asked)


class ByHash:
    """Looks for pairs by the hashes of a job's queries, and by those of other views of these."""

    def __init__(self, job: Job, near: NearConfig) -> None:
        queries, base = (
            dataclasses.replace(side, vectors=list, turned=None, cropped=None)
            for side in (job.queries, job.base)
        )
        self.job, self._near = dataclasses.replace(job, queries=queries, base=base), near

    @cached_property
    def _tables(self) -> tuple[list[HashTable], list[HashTable]]:
        """The base's hashes, to be searched by the queries', and by those of their views."""
        job, near = self.job, self._near
        base = [each[job.base.chosen] for each in job.base.hashes]
        plain = [] if job.swapped or job.more else [HashTable(each, near.hash_distance) for each in base]
        return plain, [HashTable(each, near.view_distance) for each in base] if job.views else []

    def pairs(self, block: slice) -> list[Rows]:
        job, (plain, seen) = self.job, self._tables
        rows, base = job.queries.chosen[block], job.base.chosen
        found = []
        for table, own in zip(plain, job.queries.hashes, strict=False):
            found += [_pairs(rows[a], base[b], 0, job) for a, b in table.near(own[rows])]
        return found + [_pairs(rows[a], base[b], view, job) for view, a, b in _in_views(job, rows, seen)]


def _looked_up(asked: tuple[ByHash, slice]) -> list[Rows]:
    looks, block = asked
    return looks.pairs(block)


def _in_views(job: Job, rows: Rows, tables: list[HashTable]) -> Iterator[tuple[int, Rows, Rows]]:
    """View, place in `rows` and place in the base of what hashes of other views find."""
    if not tables:
        return
    *both, spread = hashes(job.queries.thumbs.rows(rows), job.views)
    for number, view in enumerate(job.views):
        worth = np.flatnonzero(spread[number] >= BLANK)
        for table, own in zip(tables, both, strict=True):
            for a, b in table.near(own[number][worth]):
                yield view, worth[a], b


def _pairs(query: Rows, base: Rows, view: int, job: Job) -> Rows:
    """[p, 3] first row, second row and view of what was found for a view of the queries."""
    if job.swapped:
        return np.stack([base, query, np.full_like(query, view)], axis=1)
    of_first = view + OF_FIRST if view in TILES else UNDONE[view]
    if not job.inside:
        return np.stack([query, base, np.full_like(query, of_first)], axis=1)
    two = query != base
    query, base = query[two], base[two]
    views = np.where(query < base, of_first, view)
    return np.stack([np.minimum(query, base), np.maximum(query, base), views], axis=1)


def once(rows: Rows) -> Rows:
    """Each row once, sorted."""
    rows = rows[np.lexsort(rows.T[::-1])]
    fresh = np.ones(len(rows), bool)
    fresh[1:] = (rows[1:] != rows[:-1]).any(axis=1)
    return rows[fresh]


def gathered(folder: Path, count: int, memory_gib: float) -> Iterator[Rows]:
    """[p, 3] candidates of all pieces, each once, sorted, a range of first rows (of `count`) at a time."""
    paths = sorted(folder.glob("[0-9]*.parquet"))
    total = sum(parquet.read_metadata(path).num_rows for path in paths)
    ranges = max(1, -(-total * HELD // int(memory_gib * 2**30)))
    step = max(1, -(-count // ranges))
    for low in range(0, max(count, 1), step):
        inside = [("a", ">=", low), ("a", "<", low + step)]
        tables = [parquet.read_table(path, filters=inside) for path in paths]
        found = [np.stack([table[name].to_numpy() for name in COLUMNS], axis=1) for table in tables]
        yield once(np.concatenate([np.zeros((0, 3), np.int64), *found]))
