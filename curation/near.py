"""Pairs of near-identical pictures, inside a set or between two: candidates, then a second look at each.

Candidates come from two sides that fail differently: hashes a few bits apart (they find recoloured and
resized copies, and do not depend on the pool), and nearest neighbours by embedding (they find crops). Both
are also asked for other views of a picture, and neighbours for windows of it (`curation.views`). Each
candidate is then laid over its partner (`curation.align`); a picture's nearest that does not fit is tried
tilted and recoloured (`curation.second_look`). The best score of all is the pair's similarity. With `verify`
off the similarity is the cosine, as DINOv2 (app. A) does with SSCD embeddings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from curation.align import align
from curation.config import BUILT_IN, NearConfig
from curation.embed import Embedded, whitening_of
from curation.ingest import Ingested, Stack, rows_before
from curation.run import Run
from curation.search import Side, gathered, jobs, look_up, piece_of, prepare, search_pieces
from curation.second_look import look_again
from curation.views import OF_FIRST, Cropped, Turned, seen
from dinov2.files import lock, write_json, write_table

PAIRS_PER_PIECE = 16_384  # at most
PIECES = 32  # at least, where there are pairs enough: so that processes end at about the same time
LEAST_PAIRS = 512
FITS = 0.8  # a score from which a pair needs no second look

Rows = NDArray[np.int64]
Halves = NDArray[np.float16]


class Pictures:
    """One set as the search sees it: rows are the readable pictures by rising id."""

    def __init__(self, run: Run, role: str):
        ingested, embedded = Ingested(run, role), Embedded(run, role)
        self._embedded = embedded
        self.table = ingested.readable()
        self.ids = embedded.ids
        self.thumbs = ingested.thumbs()
        self.hashes = [self.table[name].to_numpy() for name in ("phash", "pca_hash")]
        self.tall = (self.table["height"].to_numpy() / self.table["width"].to_numpy()).astype(np.float32)
        self.turned: Callable[[int], Turned] | None = None
        self.cropped: Callable[[int], Cropped] | None = None
        if run.config.backbone == BUILT_IN:
            whitening = whitening_of(run)
            self.turned = partial(Turned, ingested.raw(), whitening)
            self.cropped = partial(Cropped, self.thumbs, whitening)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def vectors(self) -> Any:
        """Of the pictures, fp16; opening them brings torch."""
        return self._embedded.vectors

    def side(self, rows: Rows) -> Side:
        return Side(lambda: self.vectors, self.hashes, self.thumbs, self.turned, rows, self.cropped)

    def codes(self, column: str) -> Rows:
        """A number for each row, equal where the column is."""
        return self.table[column].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)


@dataclass(frozen=True)
class Candidates:
    """Pairs of rows (of the first and the second set; a < b inside one set), once for each view, sorted."""

    pairs: Rows  # [p, 2]
    view: Rows  # [p] curation.views
    cosine: NDArray[np.float32]
    hamming: NDArray[np.int64]  # of the closer of the two hashes

    def looked_at_again(self, settings: NearConfig) -> NDArray[np.bool_]:
        """[p] which are tried tilted and recoloured, where they do not fit as they are."""
        return nearest_of(self.pairs, self.view, self.cosine, settings.tilted, settings.tilts)

    def table(self) -> pa.Table:
        columns = {
            "a": self.pairs[:, 0],
            "b": self.pairs[:, 1],
            "view": self.view.astype(np.int8),
            "cosine": self.cosine,
            "hamming": self.hamming,
        }
        return pa.table({name: pa.array(np.ascontiguousarray(values)) for name, values in columns.items()})

    @classmethod
    def read(cls, path: Path) -> "Candidates":
        table = parquet.read_table(path)
        pairs = np.stack([table["a"].to_numpy(), table["b"].to_numpy()], axis=1)
        view, cosine, hamming = (table[name].to_numpy() for name in ("view", "cosine", "hamming"))
        return cls(pairs, view.astype(np.int64), cosine, hamming)


def start_workers(run: Run, stage: str, settings: NearConfig) -> None:
    """Start the processes that will verify, while this one imports torch and searches, mostly on one core.

    Not where the search is done, as nothing may be left to verify, nor for so few pictures that one would do.
    """
    searched = (run.stage(stage) / "candidates.parquet").exists()
    if settings.verify and not searched and len(run.sets["pool"]) > LEAST_PAIRS:
        run.workers.start(align_piece)


def near_pairs(
    run: Run, stage: str, first: Pictures, rows: Rows, second: Pictures | None, settings: NearConfig
) -> tuple[Rows, NDArray[np.float32]]:
    """[p, 2] pairs among `rows` of `first`, or of one of these and one of `second`, with their similarity.

    Each pair once, as similar as in the view in which it is the most.
    """
    path = run.stage(stage) / "candidates.parquet"
    if not path.exists():
        _search(run, stage, first, rows, second, settings)
        candidates = _gathered(run, stage, first, second)
        write_table(path, candidates.table())
    candidates = Candidates.read(path)
    if settings.verify:
        _verify(run, stage, candidates, first, second or first, settings)
    pairs, similarity = likest_views(candidates.pairs, scores_of(run, stage, candidates, settings))
    live = np.isin(pairs[:, 0], rows)  # not what was taken out since the search
    if second is None:
        live &= np.isin(pairs[:, 1], rows)
    return pairs[live], similarity[live]


def likest_views(pairs: Rows, similarity: NDArray[np.float32]) -> tuple[Rows, NDArray[np.float32]]:
    """Of sorted pairs each once, with its largest similarity."""
    fresh = np.ones(len(pairs), bool)
    fresh[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
    start = np.flatnonzero(fresh)
    return pairs[start], np.maximum.reduceat(similarity, start) if len(start) else similarity


def scores_of(run: Run, stage: str, candidates: Candidates, settings: NearConfig) -> NDArray[np.float32]:
    """The similarity of each candidate of a finished search."""
    if not settings.verify:
        return candidates.cosine
    return aligned(run.stage(stage))


def aligned(folder: Path) -> NDArray[np.float32]:
    """The score of each candidate, from the pieces in which it was found."""
    parts = sorted((folder / "aligned").glob("*.parquet"))
    return np.concatenate(
        [np.zeros(0, np.float32), *(parquet.read_table(part)["score"].to_numpy() for part in parts)]
    )


def _verify(
    run: Run, stage: str, candidates: Candidates, first: Pictures, second: Pictures, settings: NearConfig
) -> None:
    count = len(candidates.pairs)
    step = min(PAIRS_PER_PIECE, max(LEAST_PAIRS, count // PIECES))
    spans = [slice(at, min(at + step, count)) for at in range(0, count, step)]
    paths = [run.stage(stage) / "aligned" / f"{number:05d}.parquet" for number in range(len(spans))]
    what, again = f"{stage}: verify", candidates.looked_at_again(settings)
    known = _scores_before(run, stage, candidates, again, settings)
    pieces = [
        Piece(
            paths[number],
            candidates.pairs[spans[number]],
            candidates.view[spans[number]],
            again[spans[number]],
            known[spans[number]],
            first.thumbs,
            second.thumbs,
            second.tall[candidates.pairs[spans[number], 1]],
        )
        for number in run.share.take(len(spans), lambda number: paths[number].exists(), what)
    ]
    total = run.share.part_of(count, pieces)
    run.workers.do(align_piece, pieces, what=what, total=total, unit="pair")
    run.share.leave(what)


def nearest_of(
    pairs: Rows, view: Rows, cosine: NDArray[np.float32], least: float, few: int
) -> NDArray[np.bool_]:
    """[p] which are, as they are, of at least this cosine and among the `few` nearest of either picture."""
    plain = (view == 0) & (cosine >= least)
    found, cosine = np.zeros(len(plain), bool), cosine[plain]
    for rows in pairs[plain].T:
        order, counts = np.lexsort((-cosine, rows)), np.bincount(rows)
        many, start = counts >= few, np.cumsum(counts) - counts
        farthest = np.full(len(counts), -np.inf, np.float32)
        farthest[many] = cosine[order[start[many] + few - 1]]
        found[plain] |= cosine >= farthest[rows]
    return found


@dataclass(frozen=True)
class Piece:
    """Candidate pairs to verify, where the result goes, and the thumbnails of both sides."""

    path: Path
    pairs: Rows
    view: Rows
    again: NDArray[np.bool_]  # [p] who is looked at again, where it does not fit
    known: NDArray[np.float32]  # [p] scores from before other pictures came; NaN: none
    first: Stack
    second: Stack
    tall: NDArray[np.float32]  # [p] height over width of the second

    def __len__(self) -> int:
        return len(self.pairs)

    def opened(self, those: Rows) -> tuple[NDArray[np.uint8], Rows]:
        """Thumbnails in all views that are wanted of those pairs, and the pairs as rows of these."""
        thumbs, pairs = [], []
        view = self.view[those]
        views = (np.where(view >= OF_FIRST, view - OF_FIRST, 0), np.where(view >= OF_FIRST, 0, view))
        start = 0
        for stack, rows, view in zip((self.first, self.second), self.pairs[those].T, views, strict=True):
            both, place = np.unique(view * len(stack) + rows, return_inverse=True)
            in_view, rows_seen = np.divmod(both, len(stack))
            plain = stack.rows(rows_seen)
            for each in np.unique(in_view[in_view > 0]):
                mine = in_view == each
                plain[mine] = seen(plain[mine], int(each))
            thumbs.append(plain)
            pairs.append(place + start)
            start += len(both)
        return np.concatenate(thumbs), np.stack(pairs, axis=1)


def align_piece(piece: Piece) -> int:
    """Write the score of each pair; returns how many there are."""
    score = piece.known.copy()
    fresh = np.flatnonzero(np.isnan(score))
    if len(fresh):
        score[fresh] = _scored(piece, fresh)
    write_table(piece.path, pa.table({"score": score}))
    return len(piece.pairs)


def _scored(piece: Piece, those: Rows) -> NDArray[np.float32]:
    thumbs, pairs = piece.opened(those)
    score = align(thumbs, pairs).score.copy()
    again = np.flatnonzero(piece.again[those] & (score < FITS))
    score[again] = np.maximum(score[again], look_again(thumbs, pairs[again], piece.tall[those[again]]))
    return np.round(score, 4)


def _scores_before(
    run: Run, stage: str, now: Candidates, again: NDArray[np.bool_], settings: NearConfig
) -> NDArray[np.float32]:
    """[p] the score of each candidate as it was before the sources changed; NaN where it has to be found."""
    found = np.full(len(now.pairs), np.nan, np.float32)
    folder = run.before(stage)
    if folder is None or not (folder / "done.json").exists() or not (folder / "aligned").is_dir():
        return found
    old = Candidates.read(folder / "candidates.parquet")
    second = "pool" if stage == "duplicates" else "holdout"
    ends = [rows_before(run, role) for role in ("pool", second)]
    pairs = np.stack([rows[end] for rows, end in zip(ends, now.pairs.T, strict=True)], axis=1)
    both = np.concatenate([np.column_stack([old.pairs, old.view]), np.column_stack([pairs, now.view])])
    _, place = np.unique(both, axis=0, return_inverse=True)
    row = np.full(place.max(initial=-1) + 1, -1)
    row[place[: len(old.pairs)]] = np.arange(len(old.pairs))
    row = row[place[len(old.pairs) :]]
    # Who is looked at again depends on its neighbours, which may be others now.
    same = (row >= 0) & (old.looked_at_again(settings)[row] == again)
    found[same] = aligned(folder)[row[same]]
    return found


def _search(
    run: Run, stage: str, first: Pictures, rows: Rows, second: Pictures | None, settings: NearConfig
) -> None:
    """Leave every candidate in a piece of `search/`; `search/engines.json` says how, and with what recall."""
    folder, what = run.stage(stage) / "search", f"{stage}: search"
    second_side = None if second is None else second.side(np.arange(len(second)))
    todo = jobs(first.side(rows), second_side, folder, settings)
    count = sum(len(job.blocks()) for job in todo)
    wanted = run.share.take(count, lambda number: piece_of(folder, number).exists(), what)
    if wanted:
        by_hash = look_up(todo, wanted, settings, run.workers, what)
        with lock(folder / ".index.lock"):  # of several shards one builds the index, and the others wait
            write_json(folder / "engines.json", prepare(todo, run.config.search))
        search_pieces(todo, wanted, by_hash, folder, settings, run.config.search, what)
    run.share.leave(what)


def _gathered(run: Run, stage: str, first: Pictures, second: Pictures | None) -> Candidates:
    other = second or first
    parts = []
    for found in gathered(run.stage(stage) / "search", len(first), run.config.search.memory_gib / 4):
        pairs = found[:, :2]
        hamming = np.full(len(pairs), 64, np.int64)
        for mine, theirs in zip(first.hashes, other.hashes, strict=True):
            apart = np.bitwise_count(mine[pairs[:, 0]] ^ theirs[pairs[:, 1]]).astype(np.int64)
            hamming = np.minimum(hamming, apart)
        parts.append((pairs, found[:, 2], cosines(first.vectors, other.vectors, pairs), hamming))
    return Candidates(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def cosines(first: Any, second: Any, pairs: Rows) -> NDArray[np.float32]:
    """Of pairs of rows of two sets of fp16 vectors."""
    cosine = np.empty(len(pairs), np.float32)
    for at in range(0, len(pairs), PAIRS_PER_PIECE):
        a, b = pairs[at : at + PAIRS_PER_PIECE].T
        products = first[a].astype(np.float32) * second[b].astype(np.float32)
        cosine[at : at + len(a)] = products.sum(axis=1)
    return np.round(cosine, 4)
