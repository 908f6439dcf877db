"""Stage 1: read and decode every picture once; keep hashes, size, flags, a thumbnail and the raw descriptor.

Pictures are taken in the order of their ids, a piece at a time. A piece is `NNNNN.parquet` with a row for
every picture (`error` says why one could not be read) beside `NNNNN.thumbs.npy` and `NNNNN.raw.npy` with
a row for every readable one. The Parquet file is written last: where it is, the piece is done.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image
from pyarrow import parquet

from curation import descriptor, looks
from curation.config import BUILT_IN, IngestConfig
from curation.run import Run
from curation.taken import HASHES, taken
from dinov2.data.decode import Unreadable, decode
from dinov2.data.sources import Source
from dinov2.exits import UserError
from dinov2.files import write_table, write_whole

SCHEMA = pa.schema(
    {
        "id": pa.large_string(),
        "sha256": pa.large_string(),
        "pixel_sha256": pa.large_string(),
        "format": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "bytes": pa.int64(),
        "phash": pa.uint64(),
        "pca_hash": pa.uint64(),
        "flags": pa.list_(pa.string()),
        "error": pa.string(),
    }
)


def run(run: Run) -> dict[str, Any]:
    """Ingest pool, seeds and holdout; drop from the pool what cannot be read or has a flag to drop."""
    config = run.config
    for role, source in run.sets.items():
        folder = run.stage("ingest") / role
        before = before_of(run, role)
        gone = frozenset(taken(run.folder)["id"].to_pylist() if role == "pool" else [])
        starts = range(0, len(source), config.ingest.piece)
        spans = [(start, min(start + config.ingest.piece, len(source))) for start in starts]
        wanted = run.share.take(
            len(spans), lambda number, at=folder: (at / f"{number:05d}.parquet").exists(), f"ingest {role}"
        )
        pieces = [
            Piece(folder / f"{number:05d}", source.select(np.arange(*spans[number])), before, gone)
            for number in wanted
        ]
        work = partial(ingest_piece, settings=config.ingest, describe=config.backbone == BUILT_IN)
        run.workers.do(work, pieces, what=f"ingest {role}", total=run.share.part_of(len(source), pieces))
    run.share.leave("ingest")
    return _summarise(run)


def _summarise(run: Run) -> dict[str, Any]:
    pool = Ingested(run, "pool").table
    rows: dict[str, list[Any]] = {"id": [], "error": []}
    counts: dict[str, Any] = {
        "pictures": len(pool),
        "unreadable": 0,
        **dict.fromkeys(run.config.ingest.drop, 0),
    }
    taken_out = taken(run.folder)
    gone = set(taken_out["id"].to_pylist())
    hashes = {word for key in HASHES for word in taken_out[key].to_pylist()} - {None}
    unlicensed = _unlicensed(run)
    columns = ("id", "flags", "error", *HASHES)
    for name, flags, error, *hashed in zip(*(pool[key].to_pylist() for key in columns), strict=True):
        if name in gone:
            continue  # "takedown" says so
        if not hashes.isdisjoint(hashed):
            rows["id"].append(name)
            rows["error"].append("equal to a picture that was taken out")
            continue
        if error is None and name in unlicensed:
            rows["id"].append(name)
            rows["error"].append(unlicensed[name])
            counts["unlicensed"] = counts.get("unlicensed", 0) + 1
            continue
        bad = [flag for flag in flags or [] if flag in run.config.ingest.drop]
        if error is not None or bad:
            rows["id"].append(name)
            rows["error"].append(error or "flagged: " + ", ".join(bad))
            for key in ["unreadable"] if error is not None else bad:
                counts[key] += 1
    if counts["unreadable"] == len(pool):
        first = next(error for error in rows["error"])
        raise UserError(
            f"pool={run.config.pool}: none of {len(pool)} pictures can be read; the first: {first}"
        )
    if len(rows["id"]) == len(pool):
        raise UserError(
            f"pool={run.config.pool}: every readable picture is {' or '.join(run.config.ingest.drop)}; "
            "see ingest.small, ingest.blank, ingest.aspect and ingest.drop"
        )
    for role in [role for role in run.sets if role != "pool"]:
        table = Ingested(run, role).table
        counts[role] = len(table)
        counts[f"{role}_unreadable"] = len(table) - table["error"].null_count
        if counts[role] == counts[f"{role}_unreadable"]:
            raise UserError(f"{role}={getattr(run.config, role)}: none of {len(table)} pictures can be read")
    run.drop("ingest", rows)
    return counts


def _unlicensed(run: Run) -> dict[str, str]:
    """Why pictures of the pool may not be used, by id: they lack the licence or the consent asked for."""
    settings, table = run.config.ingest, run.sets["pool"].table
    found: dict[str, str] = {}
    for column, wanted in (("licence", settings.licences), ("consent", settings.consents)):
        values = table[column].cast(pa.string())
        bad = pc.invert(pc.is_in(values, value_set=pa.array(wanted, pa.string())))
        for name, value in zip(
            *(part.filter(bad).to_pylist() for part in (table["id"], values)), strict=True
        ):
            if wanted:
                found.setdefault(name, f"{column}: {value or 'none given'}")
    return found


@dataclass(frozen=True)
class Piece:
    """Consecutive pictures of a set, and the path, without ending, that their results go to."""

    path: Path
    source: Source
    before: Path | None  # what was ingested before the source changed
    gone: frozenset[str]  # ids of what was taken out, which is not read again

    def __len__(self) -> int:
        return len(self.source)


def ingest_piece(piece: Piece, *, settings: IngestConfig, describe: bool) -> int:
    """Write the three files of a piece; returns how many pictures it has."""
    records, thumbs, raw = [], [], []
    known = Known(piece.before, piece.source) if piece.before is not None else {}
    for row, name in enumerate(piece.source.ids):
        if row in known:
            record, thumb, described = known[row]
        elif name in piece.gone:
            record, thumb, described = {"error": "taken out"}, None, None
        else:
            record, thumb = _ingest_one(piece.source, row, settings)
            described = descriptor.describe(thumb) if describe and thumb is not None else None
        records.append({"id": name, **record})
        if thumb is not None:
            thumbs.append(thumb)
        if described is not None:
            raw.append(described)
    _write_rows(piece.path.with_suffix(".thumbs.npy"), thumbs, (looks.THUMB, looks.THUMB, 3), np.uint8)
    if describe:
        _write_rows(piece.path.with_suffix(".raw.npy"), raw, (descriptor.LENGTH,), np.float16)
    write_table(piece.path.with_suffix(".parquet"), pa.Table.from_pylist(records, schema=SCHEMA))
    return len(records)


def _ingest_one(
    source: Source, row: int, settings: IngestConfig
) -> tuple[dict[str, Any], NDArray[np.uint8] | None]:
    try:
        data = source.read(row)
        image = decode(data, max_pixels=settings.max_pixels)
    except Unreadable as error:
        return {"error": " ".join(str(error).split()) or "unreadable"}, None
    thumb = looks.thumbnail(image)
    grey = looks.luma(thumb)
    flags = looks.flags(
        thumb, image.width, image.height, small=settings.small, blank=settings.blank, aspect=settings.aspect
    )
    with Image.open(io.BytesIO(data)) as header:
        kind = header.format
    record = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "pixel_sha256": looks.pixel_sha256(image),
        "format": kind,
        "width": image.width,
        "height": image.height,
        "bytes": len(data),
        "phash": looks.perceptual_hash(grey),
        "pca_hash": looks.pca_hash(grey),
        "flags": flags,
    }
    return record, thumb


def _write_rows(path: Path, rows: Sequence[NDArray[Any]], shape: tuple[int, ...], kind: type) -> None:
    with write_whole(path) as file:
        np.save(file, np.stack(rows).astype(kind) if rows else np.zeros((0, *shape), kind))


def before_of(run: Run, role: str) -> Path | None:
    """What ingest left of a set before its source changed, if it can be used."""
    folder = run.before("ingest")
    if folder is None or not (folder / role).is_dir() or not (folder / "done.json").exists():
        return None
    describe = run.config.backbone == BUILT_IN
    return folder / role if not describe or (folder / role / "00000.raw.npy").exists() else None


class Known:
    """By row of a source: what was ingested of the same picture, of the same size, before others came."""

    def __init__(self, folder: Path, source: Source):
        old = _opened(folder)
        place = pc.index_in(source.table["id"].combine_chunks(), value_set=old.ids)
        sizes = source.table["size"].to_pylist()
        rows = ((row, old_row) for row, old_row in enumerate(place.to_pylist()) if old_row is not None)
        self._rows = {row: at for row, at in rows if sizes[row] == old.bytes[at] and old.place[at] >= 0}
        self._old = old

    def __contains__(self, row: int) -> bool:
        return row in self._rows

    def __getitem__(self, row: int) -> tuple[dict[str, Any], NDArray[np.uint8], NDArray[np.float16] | None]:
        at = self._rows[row]
        (record,) = self._old.ingested.table.slice(at, 1).drop_columns("id").to_pylist()
        where = np.array([self._old.place[at]])
        (thumb,) = self._old.thumbs.rows(where)
        return record, thumb, self._old.raw.rows(where)[0] if self._old.raw is not None else None


@cache
def _opened(folder: Path) -> "_Old":
    return _Old(folder)


class _Old:
    def __init__(self, folder: Path):
        self.ingested = Ingested.at(folder)
        table = self.ingested.table
        self.ids = table["id"].combine_chunks()
        self.bytes = table["bytes"].to_pylist()
        readable = table["error"].is_null().to_numpy()
        self.place = np.where(readable, np.cumsum(readable) - 1, -1)
        self.thumbs = self.ingested.thumbs()
        described = (folder / "00000.raw.npy").exists()
        self.raw = self.ingested.raw() if described else None


class Ingested:
    """What ingest left of one set (`pool`, `seeds` or `holdout`)."""

    def __init__(self, run: Run, role: str):
        self._open(run.stage("ingest") / role)

    @classmethod
    def at(cls, folder: Path) -> "Ingested":
        """What lies in this folder."""
        self = cls.__new__(cls)
        self._open(folder)
        return self

    def _open(self, folder: Path) -> None:
        self.folder = folder
        self.parts = sorted(self.folder.glob("*.parquet"))
        self.table = pa.concat_tables([parquet.read_table(part) for part in self.parts]).combine_chunks()

    def readable(self) -> pa.Table:
        """The rows of readable pictures, in the order of `thumbs()` and of the embeddings."""
        return self.table.filter(self.table["error"].is_null()).combine_chunks()

    def thumbs(self) -> "Stack":
        return Stack([part.with_suffix(".thumbs.npy") for part in self.parts])

    def raw(self) -> "Stack":
        return Stack([part.with_suffix(".raw.npy") for part in self.parts])


class Stack:
    """Arrays in several files read as one, memory-mapped: only the rows asked for come into memory."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = list(paths)
        self.arrays = [np.load(path, mmap_mode="r") for path in self._paths]
        self.starts = np.cumsum([0] + [len(array) for array in self.arrays])

    def __reduce__(self) -> tuple[type["Stack"], tuple[list[Path]]]:
        return Stack, (
            self._paths,
        )  # a process that is sent a stack maps it anew; else all rows would be sent

    def __len__(self) -> int:
        return int(self.starts[-1])

    def rows(self, wanted: NDArray[np.int64]) -> NDArray[Any]:
        """The rows with these numbers, in this order."""
        result = np.empty((len(wanted), *self.arrays[0].shape[1:]), self.arrays[0].dtype)
        part = np.searchsorted(self.starts, wanted, side="right") - 1
        for number in np.unique(part):
            mine = part == number
            result[mine] = self.arrays[number][wanted[mine] - self.starts[number]]
        return result
