"""Stage 1: read and decode every picture once; keep hashes, size, flags, a thumbnail and the raw descriptor.

Pictures are taken in the order of their ids, a piece at a time. A piece is `NNNNN.parquet` with a row for
every picture (`error` says why one could not be read) beside `NNNNN.thumbs.npy` and `NNNNN.raw.npy` with
a row for every readable one. The Parquet file is written last: where it is, the piece is done.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image
from pyarrow import parquet

from curation import descriptor, looks
from curation.config import BUILT_IN, IngestConfig
from curation.run import BEFORE, Run
from curation.taken import among, taken
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
FEW = 3  # values that a message names


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
    lost = list(_lost(run, pool))
    kinds = Counter(kind for one in lost for kind in one.kinds)
    counts: dict[str, Any] = {"pictures": len(pool)}
    counts |= {kind: kinds[kind] for kind in ("unreadable", *run.config.ingest.drop)}
    if unlicensed := kinds["licence"] + kinds["consent"]:
        counts["unlicensed"] = unlicensed
    if kinds["unreadable"] == len(pool):
        raise UserError(
            f"pool={run.config.pool}: none of {len(pool)} pictures can be read; the first: {lost[0].why}"
        )
    if len(lost) == len(pool):
        reasons = "; ".join(_reasons(kinds, lost, run.config.ingest))
        raise UserError(
            f"pool={run.config.pool}: nothing is left of {len(pool)} pictures: {reasons}; settings can be "
            "changed with from_stage=ingest"
        )
    for role in [role for role in run.sets if role != "pool"]:
        table = Ingested(run, role).table
        counts[role] = len(table)
        counts[f"{role}_unreadable"] = len(table) - table["error"].null_count
        if counts[role] == counts[f"{role}_unreadable"]:
            raise UserError(f"{role}={getattr(run.config, role)}: none of {len(table)} pictures can be read")
    run.drop("ingest", {"id": [one.id for one in lost], "error": [one.why for one in lost]})
    return counts


class Lost(NamedTuple):
    """A picture that ingest drops: "unreadable", "taken out", "licence", "consent", or its flags."""

    id: str
    kinds: list[str]
    why: str


def _lost(run: Run, pool: pa.Table) -> Iterator[Lost]:
    record = taken(run.folder)
    gone = set(record["id"].to_pylist())
    equal = among(pool, record).tolist()
    unlicensed = _unlicensed(run)
    rows = zip(*(pool[key].to_pylist() for key in ("id", "flags", "error")), equal, strict=True)
    for name, flags, error, out in rows:
        bad = [flag for flag in flags or [] if flag in run.config.ingest.drop]
        if name in gone:
            continue  # "takedown" says so
        if out:
            yield Lost(name, ["taken out"], "equal to a picture that was taken out")
        elif error is not None:
            yield Lost(name, ["unreadable"], error)
        elif name in unlicensed:
            yield Lost(name, [unlicensed[name].partition(":")[0]], unlicensed[name])
        elif bad:
            yield Lost(name, bad, "flagged: " + ", ".join(bad))


def _reasons(kinds: Counter[str], lost: list[Lost], settings: IngestConfig) -> Iterator[str]:
    """How many were lost to what, the most first, and the setting that says so."""
    for kind, count in kinds.most_common():
        if kind in ("licence", "consent"):
            there = Counter(one.why.partition(": ")[2] for one in lost if one.kinds == [kind])
            few = ", ".join(f"{value} ({number:,})" for value, number in there.most_common(FEW))
            key, wanted = f"ingest.{kind}s", getattr(settings, f"{kind}s")
            yield f"{count:,} have no {kind} among {key}=[{', '.join(wanted)}], but: {few}"
        elif kind in settings.drop:
            limit = getattr(settings, kind)
            yield f"{count:,} are flagged {kind} (ingest.{kind}={limit:g}, and {kind!r} is in ingest.drop)"
        else:
            yield f"{count:,} {'cannot be read' if kind == 'unreadable' else 'equal what was taken out'}"


def _unlicensed(run: Run) -> dict[str, str]:
    """Why pictures of the pool may not be used, by id: they lack the licence or the consent asked for."""
    settings, table = run.config.ingest, run.sets["pool"].table
    found: dict[str, str] = {}
    for column, wanted in (("licence", settings.licences), ("consent", settings.consents)):
        rows = pa.table([table["id"], table[column].cast(pa.string())], ["id", "value"])
        bad = pc.invert(pc.is_in(rows["value"], value_set=pa.array(wanted, pa.string())))
        for row in rows.filter(bad).to_pylist() if wanted else []:
            found.setdefault(row["id"], f"{column}: {row['value'] or 'none given'}")
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
        if name in piece.gone:
            record, thumb, described = {"error": "taken out"}, None, None
        elif row in known:
            record, thumb, described = known[row]
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


def rows_before(run: Run, role: str) -> NDArray[np.int64]:
    """[n] the row that each readable picture had, with these bytes, before the source changed; -1: none."""
    now = Ingested(run, role).readable()
    before = Ingested.at(run.folder / BEFORE / "ingest" / role).readable()
    place = pc.index_in(now["id"].combine_chunks(), value_set=before["id"].combine_chunks())
    same = pc.fill_null(pc.equal(before["sha256"].take(place), now["sha256"]), False)
    return np.where(same.to_numpy(), pc.fill_null(place, -1).to_numpy(), -1).astype(np.int64)


class Known:
    """By row of a source: what was ingested of the same picture, of the same bytes, before others came.

    A picture as large as before has the same bytes if its file has not been touched since, else if it has the
    same SHA-256.
    """

    def __init__(self, folder: Path, source: Source):
        old = _opened(folder)
        place = pc.index_in(source.table["id"].combine_chunks(), value_set=old.ids)
        sizes = source.table["size"].to_pylist()
        rows = ((row, old_row) for row, old_row in enumerate(place.to_pylist()) if old_row is not None)
        self._rows = {row: at for row, at in rows if sizes[row] == old.bytes[at] and old.place[at] >= 0}
        self._source, self._old = source, old

    def __contains__(self, row: int) -> bool:
        return row in self._rows and (not self._touched(row) or self._same(row))

    def _touched(self, row: int) -> bool:
        path = self._source.file(row)
        # Not the time of modification, which copying may preserve.
        return path is not None and path.stat().st_ctime > self._old.began

    def _same(self, row: int) -> bool:
        sha256 = self._old.ingested.table["sha256"][self._rows[row]].as_py()
        return hashlib.sha256(self._source.read(row)).hexdigest() == sha256

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
        self.began = min(part.stat().st_mtime for part in self.ingested.parts)
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
        return Stack, (self._paths,)  # who is sent a stack maps it anew; else all rows would be sent

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
