"""Stage 9: what is left as WebDataset shards of original bytes, a manifest, a decision for every picture.

Shards hold the pictures in the order of their ids; ids are hashes, so that is a shuffle which never
changes.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from curation.faces import Box, blurred
from curation.filters import BLURRED, boxes_of
from curation.ingest import Ingested
from curation.looks import pixel_sha256
from curation.run import Run
from dinov2.data.decode import decode
from dinov2.data.manifest import DECISIONS_SCHEMA, MANIFEST_SCHEMA, write_format, write_manifest
from dinov2.data.shards import ShardSample, write_shard
from dinov2.data.sources import Source
from dinov2.exits import UserError
from dinov2.files import write_table

BEFORE = ["takedown", "ingest", "filters", "duplicates", "holdout", "retrieval", "budget"]
DROPS = {  # by what stages drop
    "takedown": "remove=",
    "ingest": "ingest.drop, ingest.licences and ingest.consents",
    "filters": "filters.classifiers.NAME.most",
    "duplicates": "duplicates.threshold",
    "holdout": "holdout= and leaks.threshold",
    "retrieval": "retrieval.minimum and retrieval.more_than",
    "budget": "budget.retrieved and budget.clustered",
}
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}  # else the format's own name
CHANGED = ["sha256", "pixel_sha256", "format", "flags"]  # what blurring changes
DESCRIBED = ["uri", "source", "label", "split", "licence", "consent", "sha256", "format", "width", "height"]


def run(run: Run) -> dict[str, Any]:
    """Write `decisions.parquet`, the shards, and `manifest.parquet`."""
    source = run.sets["pool"]
    pool = Ingested(run, "pool").table
    live = np.flatnonzero(run.kept(pool["id"].combine_chunks(), BEFORE))
    write_format(run.folder / "decisions.parquet", decisions(run, source, pool), DECISIONS_SCHEMA)
    if not len(live):
        gone = ", ".join(f"{stage} {count:,}" for stage in BEFORE if (count := len(run.dropped(stage))))
        last = next(stage for stage in reversed(BEFORE) if len(run.dropped(stage)))
        raise UserError(
            f"nothing is left of pool={run.config.pool}: dropped by {gone}; what went last, went by "
            f"{DROPS[last]}; see decisions.parquet"
        )
    table = _joined(source, pool).take(pa.array(live))
    faces = boxes_of(run)
    size = run.config.write.shard
    spans = [slice(at, at + size) for at in range(0, len(live), size)]
    places = [run.stage("write") / f"{number:06d}.parquet" for number in range(len(spans))]
    pieces = [
        Piece(
            run.folder / "shards" / f"{number:06d}.tar",
            place,
            source.select(live[span]),
            table.slice(span.start, size),
            [faces.get(name, []) for name in table["id"].slice(span.start, size).to_pylist()],
            run.config.ingest.max_pixels,
        )
        for number, (span, place) in enumerate(zip(spans, places, strict=True))
        if not place.exists()
    ]
    run.workers.do(write_piece, pieces, what="write", total=len(live))
    located = pa.concat_tables([parquet.read_table(place) for place in places])
    for name in located.column_names:
        table = table.drop_columns(name) if name in table.column_names else table
        table = table.append_column(name, located[name])
    write_manifest(run.folder / "manifest.parquet", table.select(MANIFEST_SCHEMA.names))
    return {"pictures": len(live), "shards": len(spans)}


@dataclass(frozen=True)
class Piece:
    """A shard: its path, where its offsets go, and its pictures with their columns of the manifest."""

    path: Path
    offsets: Path
    source: Source
    table: pa.Table
    faces: list[list[Box]]  # to be blurred in each picture
    max_pixels: int

    def __len__(self) -> int:
        return len(self.source)


def write_piece(piece: Piece) -> int:
    """Write a shard, then the table of its offsets; returns how many pictures it has."""
    changed: list[dict[str, Any]] = []
    places = write_shard(piece.path, _samples(piece, changed))
    offsets, sizes = zip(*places, strict=True)
    table = pa.Table.from_pylist(changed, schema=pa.schema([MANIFEST_SCHEMA.field(name) for name in CHANGED]))
    written = {"shard": [f"shards/{piece.path.name}"] * len(places), "offset": offsets, "size": sizes}
    for name, values in written.items():
        table = table.append_column(name, pa.array(values, MANIFEST_SCHEMA.field(name).type))
    write_table(piece.offsets, table)
    return len(places)


def _samples(piece: Piece, changed: list[dict[str, Any]]) -> Iterator[ShardSample]:
    """Pictures as they go into the shard; what is then true of each is added to `changed`."""
    for row, record in enumerate(piece.table.to_pylist()):
        data = piece.source.read(row)
        if hashlib.sha256(data).hexdigest() != record["sha256"]:
            raise UserError(
                f"{record['uri']} in {record['source']} has other bytes than when it was decided on; "
                "put them back, or curate into a new output folder"
            )
        if piece.faces[row]:
            data, record = _without_faces(data, record, piece.faces[row], piece.max_pixels)
        changed.append({name: record[name] for name in CHANGED})
        described = {key: record[key] for key in DESCRIBED if record[key] is not None}
        yield ShardSample(record["id"], _extension(record), data, described, record["label"])


def _without_faces(
    data: bytes, record: dict[str, Any], boxes: list[Box], max_pixels: int
) -> tuple[bytes, dict[str, Any]]:
    data, kind = blurred(data, boxes, record["format"], max_pixels=max_pixels)
    image = decode(data, max_pixels=max_pixels)
    facts = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "pixel_sha256": pixel_sha256(image),
        "format": kind,
        "flags": [*(record["flags"] or []), BLURRED],
    }
    return data, {**record, **facts}


def _extension(record: dict[str, Any]) -> str:
    return EXTENSIONS.get(record["format"]) or record["format"].lower()


def decisions(run: Run, source: Source, pool: pa.Table) -> pa.Table:
    """One row for every picture of the pool: kept, or which stage dropped it, for whom, and how alike."""
    ids = pool["id"].combine_chunks()
    dropped = pa.concat_tables(
        [
            table.append_column("dropped_by", pa.array([stage] * len(table), pa.string()))
            for stage in BEFORE
            for table in [run.dropped(stage)]
        ]
    )
    place = pc.index_in(ids, value_set=dropped["id"].combine_chunks())
    rows = dropped.select(["dropped_by", "evidence", "similarity", "error"]).take(place)
    table = pa.table({"id": ids, "uri": source.table["uri"], "kept": pc.is_null(place)})
    for name in rows.column_names:
        table = table.append_column(name, rows[name])
    return table


def _joined(source: Source, pool: pa.Table) -> pa.Table:
    """What the source says of its pictures beside what ingest found; both are in the order of ids."""
    table = pool.drop_columns(["bytes", "error"])
    for name in ("uri", "source", "label", "split", "licence", "consent"):
        table = table.append_column(name, source.table[name])
    return table
