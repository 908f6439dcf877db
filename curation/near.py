"""Pairs of near-identical pictures, inside a set or between two: candidates, then a second look at each.

Candidates come from two sides that fail differently: hashes a few bits apart (they find recoloured and
resized copies, and do not depend on the pool), and nearest neighbours by embedding (they find crops).
Each candidate is then laid over its partner (`curation.align`), and the score of that is the pair's
similarity. With `verify` off the similarity is the cosine, as DINOv2 (app. A) does with SSCD embeddings.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from curation.align import align
from curation.config import NearConfig
from curation.embed import Embedded
from curation.ingest import Ingested, Stack
from curation.run import Run
from curation.search import Side, gathered, jobs, piece_of, prepare, search_pieces
from dinov2.files import lock, write_json, write_table

PAIRS_PER_PIECE = 20_000

Rows = NDArray[np.int64]
Halves = NDArray[np.float16]


class Pictures:
    """One set as the search sees it: rows are the readable pictures by rising id."""

    def __init__(self, run: Run, role: str):
        ingested, embedded = Ingested(run, role), Embedded(run, role)
        self.role = role
        self.table = ingested.readable()
        self.ids = embedded.ids
        self.vectors = embedded.vectors
        self.thumbs = ingested.thumbs()
        self.hashes = [self.table[name].to_numpy() for name in ("phash", "pca_hash")]

    def __len__(self) -> int:
        return len(self.ids)

    def side(self, rows: Rows) -> Side:
        return Side(self.vectors, self.hashes, rows)

    def codes(self, column: str) -> Rows:
        """A number for each row, equal where the column is."""
        return self.table[column].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)


@dataclass(frozen=True)
class Candidates:
    """Pairs of rows (of the first and the second set; a < b inside one set), each once, sorted."""

    pairs: Rows  # [p, 2]
    cosine: NDArray[np.float32]
    hamming: NDArray[np.int64]  # of the closer of the two hashes

    def table(self) -> pa.Table:
        columns = {
            "a": self.pairs[:, 0],
            "b": self.pairs[:, 1],
            "cosine": self.cosine,
            "hamming": self.hamming,
        }
        return pa.table({name: pa.array(np.ascontiguousarray(values)) for name, values in columns.items()})

    @classmethod
    def read(cls, path: Path) -> "Candidates":
        table = parquet.read_table(path)
        pairs = np.stack([table["a"].to_numpy(), table["b"].to_numpy()], axis=1)
        return cls(pairs, table["cosine"].to_numpy(), table["hamming"].to_numpy())


def near_pairs(
    run: Run, stage: str, first: Pictures, rows: Rows, second: Pictures | None, settings: NearConfig
) -> tuple[Candidates, NDArray[np.float32]]:
    """Candidates among `rows` of `first`, or between them and all of `second`, with their similarity."""
    path = run.stage(stage) / "candidates.parquet"
    if not path.exists():
        _search(run, stage, first, rows, second, settings)
        candidates = _gathered(run, stage, first, second)
        write_table(path, candidates.table())
    candidates = Candidates.read(path)
    if settings.verify:
        _verify(run, stage, candidates, first, second or first)
    return candidates, scores_of(run, stage, candidates, settings)


def scores_of(run: Run, stage: str, candidates: Candidates, settings: NearConfig) -> NDArray[np.float32]:
    """The similarity of each candidate of a finished search."""
    if not settings.verify:
        return candidates.cosine
    parts = sorted((run.stage(stage) / "aligned").glob("*.parquet"))
    return np.concatenate(
        [np.zeros(0, np.float32), *(parquet.read_table(part)["score"].to_numpy() for part in parts)]
    )


def _verify(run: Run, stage: str, candidates: Candidates, first: Pictures, second: Pictures) -> None:
    spans = [
        (at, min(at + PAIRS_PER_PIECE, len(candidates.pairs)))
        for at in range(0, len(candidates.pairs), PAIRS_PER_PIECE)
    ]
    paths = [run.stage(stage) / "aligned" / f"{number:05d}.parquet" for number in range(len(spans))]
    what = f"{stage}: verify"
    pieces = [
        Piece(paths[number], candidates.pairs[slice(*spans[number])], first.thumbs, second.thumbs)
        for number in run.share.take(len(spans), lambda number: paths[number].exists(), what)
    ]
    total = run.share.part_of(len(candidates.pairs), pieces)
    run.workers.do(align_piece, pieces, what=what, total=total, unit="pair")
    run.share.leave(what)


@dataclass(frozen=True)
class Piece:
    """Candidate pairs to verify, where the result goes, and the thumbnails of both sides."""

    path: Path
    pairs: Rows
    first: Stack
    second: Stack

    def __len__(self) -> int:
        return len(self.pairs)


def align_piece(piece: Piece) -> int:
    """Write the score of each pair; returns how many there are."""
    first, a = np.unique(piece.pairs[:, 0], return_inverse=True)
    second, b = np.unique(piece.pairs[:, 1], return_inverse=True)
    thumbs = np.concatenate([piece.first.rows(first), piece.second.rows(second)])
    found = align(thumbs, np.stack([a, b + len(first)], axis=1))
    table = {"score": found.score, "detail": found.detail, "level": found.level}
    write_table(piece.path, pa.table({name: pa.array(np.round(values, 4)) for name, values in table.items()}))
    return len(piece.pairs)


def _search(
    run: Run, stage: str, first: Pictures, rows: Rows, second: Pictures | None, settings: NearConfig
) -> None:
    """Leave every candidate in a piece of `search/`; `search/engines.json` says how, and with what recall."""
    folder, what = run.stage(stage) / "search", f"{stage}: search"
    second_side = None if second is None else second.side(np.arange(len(second)))
    todo = jobs(first.side(rows), second_side, folder)
    count = sum(len(job.blocks()) for job in todo)
    wanted = run.share.take(count, lambda number: piece_of(folder, number).exists(), what)
    if wanted:
        with lock(folder / ".index.lock"):  # of several shards one builds the index, and the others wait
            write_json(folder / "engines.json", prepare(todo, run.config.search))
        search_pieces(todo, wanted, folder, settings, run.config.search, what)
    run.share.leave(what)


def _gathered(run: Run, stage: str, first: Pictures, second: Pictures | None) -> Candidates:
    other = second or first
    parts = []
    for pairs in gathered(run.stage(stage) / "search", len(first), run.config.search.memory_gib / 4):
        hamming = np.full(len(pairs), 64, np.int64)
        for mine, theirs in zip(first.hashes, other.hashes, strict=True):
            apart = np.bitwise_count(mine[pairs[:, 0]] ^ theirs[pairs[:, 1]]).astype(np.int64)
            hamming = np.minimum(hamming, apart)
        parts.append((pairs, cosines(first.vectors, other.vectors, pairs), hamming))
    return Candidates(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def cosines(first: Any, second: Any, pairs: Rows) -> NDArray[np.float32]:
    """Of pairs of rows of two sets of fp16 vectors."""
    cosine = np.empty(len(pairs), np.float32)
    for at in range(0, len(pairs), PAIRS_PER_PIECE):
        a, b = pairs[at : at + PAIRS_PER_PIECE].T
        products = first[a].astype(np.float32) * second[b].astype(np.float32)
        cosine[at : at + len(a)] = products.sum(axis=1)
    return np.round(cosine, 4)
