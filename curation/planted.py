"""Copies of some of a pool's pictures, of every kind, and what a search for them needs.

They are made in pieces of a few pictures: `NNNNN.thumbs.npy`, `NNNNN.raw.npy` for the descriptor, last
`NNNNN.parquet`; and, with a backbone, `NNNNN.vectors.npy`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image
from pyarrow import parquet
from threadpoolctl import threadpool_limits

from curation import descriptor, embed, looks
from curation.config import BUILT_IN
from curation.ingest import Ingested, Stack
from curation.run import Run
from curation.views import Turned
from dinov2.data.copies import copies_of
from dinov2.data.decode import Unreadable, decode
from dinov2.data.sources import Source
from dinov2.files import write_table, write_whole

SIDE = 256  # pixels: pictures are made so small before they are copied
PIECE = 8  # pictures

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Copies:
    """All copies, in the order of their pictures."""

    row: Rows  # of its picture among the pool's readable ones
    kind: Rows  # place in `dinov2.data.copies.KINDS`
    thumbs: Stack
    vectors: NDArray[np.float16]
    hashes: list[NDArray[np.uint64]]
    turned: Callable[[int], Turned] | None  # their vectors in one of the turns, by the descriptor

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True)
class Piece:
    """Pictures to be copied, their rows among the pool's readable ones, and where results go."""

    path: Path  # without its ending
    source: Source
    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, ending: str) -> Path:
        return self.path.with_suffix(ending)


def plant(run: Run, rows: Rows, folder: Path, what: str) -> Copies:
    """Copy these pictures of the pool, and embed the copies as the pool was."""
    readable = np.flatnonzero(Ingested(run, "pool").table["error"].is_null().to_numpy())
    pieces = [
        Piece(folder / f"{at // PIECE:05d}", run.sets["pool"].select(readable[some]), some)
        for at in range(0, len(rows), PIECE)
        for some in [rows[at : at + PIECE]]
    ]
    left = [piece for piece in pieces if not piece.at(".parquet").exists()]
    describe = run.config.backbone == BUILT_IN
    run.workers.do(partial(copy_piece, describe=describe), left, what=what, total=len(rows))
    vectors = _described(run, pieces) if describe else _embedded(run, pieces)
    table = pa.concat_tables([parquet.read_table(piece.at(".parquet")) for piece in pieces])
    return Copies(
        table["row"].to_numpy(),
        table["kind"].to_numpy(),
        Stack([piece.at(".thumbs.npy") for piece in pieces]),
        vectors,
        [table[name].to_numpy() for name in ("phash", "pca_hash")],
        partial(Turned, Stack([piece.at(".raw.npy") for piece in pieces]), embed.whitening_of(run))
        if describe
        else None,
    )


def copy_piece(piece: Piece, *, describe: bool) -> int:
    """Write what ingest would of every copy; returns how many pictures were to be copied."""
    made: list[dict[str, int]] = []
    thumbs, raw = [], []
    for row, kind, image in _copied(piece):
        thumb = looks.thumbnail(image)
        grey = looks.luma(thumb)
        thumbs.append(thumb)
        hashes = {"phash": looks.perceptual_hash(grey), "pca_hash": looks.pca_hash(grey)}
        made.append({"row": row, "kind": kind, **hashes})
        if describe:
            raw.append(descriptor.describe(thumb))
    _save(piece.at(".thumbs.npy"), np.array(thumbs, np.uint8).reshape(-1, looks.THUMB, looks.THUMB, 3))
    if describe:
        _save(piece.at(".raw.npy"), np.array(raw, np.float16).reshape(-1, descriptor.LENGTH))
    kinds = {"row": pa.int64(), "kind": pa.int64(), "phash": pa.uint64(), "pca_hash": pa.uint64()}
    write_table(piece.at(".parquet"), pa.Table.from_pylist(made, schema=pa.schema(kinds)))
    return len(piece)


def _copied(piece: Piece) -> Iterator[tuple[int, int, Image.Image]]:
    """Row, kind and picture of every copy; none of a file that has gone since ingest."""
    for place, (row, name) in enumerate(zip(piece.rows.tolist(), piece.source.ids, strict=True)):
        try:
            image = decode(piece.source.read(place), at_least=SIDE)
        except Unreadable:
            continue
        image.thumbnail((SIDE, SIDE))
        for kind, copy in enumerate(copies_of(image, int(name, 16)).values()):
            yield row, kind, copy


def _described(run: Run, pieces: list[Piece]) -> NDArray[np.float16]:
    whitening = embed.whitening_of(run)
    with threadpool_limits(1):
        parts = [whitening(np.load(piece.at(".raw.npy")).astype(np.float32)) for piece in pieces]
    return np.concatenate(parts).astype(np.float16)


def _embedded(run: Run, pieces: list[Piece]) -> NDArray[np.float16]:
    import torch  # imported here: the descriptor does without

    left = [piece for piece in pieces if not piece.at(".vectors.npy").exists()]
    embedder: Any = embed.embedder_of(run.config) if left else None
    for piece in left:
        prepared = [embedder.prepare(image) for _, _, image in _copied(piece)]
        batches = [
            prepared[at : at + run.config.embed.batch]
            for at in range(0, len(prepared), run.config.embed.batch)
        ]
        vectors = [embedder(torch.stack(batch)).cpu().numpy() for batch in batches]
        _save(
            piece.at(".vectors.npy"),
            np.concatenate([np.zeros((0, embedder.dimension)), *vectors]).astype(np.float16),
        )
    return np.concatenate([np.load(piece.at(".vectors.npy")) for piece in pieces])


def _save(path: Path, array: NDArray[Any]) -> None:
    with write_whole(path) as file:
        np.save(file, array)
