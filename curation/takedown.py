"""Take pictures out of a finished folder, as when consent is withdrawn: dinov2 curate remove=LIST output=DIR.

LIST is a text file with an id, a uri or a SHA-256 (of the file or of its pixels) a line, or CSV or Parquet
with columns of these names. Only the shards that hold such a picture are written again. What was taken out is
in `takedowns.parquet`, and stays out when the folder decides again or its pool grows. Its thumbnail is
blanked and the report, which may show it, goes (from_stage=report makes another); embeddings, hashes and
names stay.

Killed at any moment, the same command goes on. A changed shard gets a new name, the manifest is replaced
whole, and only then the old shard goes: whoever reads the folder by its manifest sees one state or the other.
"""

import datetime
import json
import re
import shutil
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv, parquet

from dinov2.config import read, required
from dinov2.data.manifest import DECISIONS_SCHEMA, read_format, read_manifest, write_format, write_manifest
from dinov2.data.shards import ShardSample, write_shard
from dinov2.exits import UserError
from dinov2.files import lock, read_json, remove_leftovers, write_json, write_table, write_whole
from dinov2.folders import LOCK

FILE = "takedowns.parquet"
SCHEMA = pa.schema(
    {
        "id": pa.large_string(),
        "uri": pa.large_string(),
        "sha256": pa.large_string(),
        "pixel_sha256": pa.large_string(),
        "asked": pa.large_string(),  # the word of the list that named it
        "on": pa.string(),  # UTC date
    }
)
WORDS = ("id", "uri", "sha256", "pixel_sha256")
REVISED = re.compile(r"(.*?)(?:-(\d+))?\.tar")


@dataclass(frozen=True, kw_only=True)
class TakedownConfig:
    remove: str = required()  # list of pictures by id, uri or SHA-256
    output: str = required()  # folder that curation has finished


def main(words: list[str]) -> None:
    """`dinov2 curate remove=LIST output=DIR`."""
    config = read(TakedownConfig, words, doc=__doc__ or "")
    folder = Path(config.output)
    if not (folder / "manifest.parquet").exists():
        raise UserError(
            f"output={folder} holds no manifest.parquet; name a folder that curation has finished"
        )
    try:
        with lock(folder / LOCK, blocking=False):
            take_out(folder, Path(config.remove))
    except BlockingIOError as error:
        raise UserError(f"output={folder} is in use by {error or 'another process'}") from None


def take_out(folder: Path, listed: Path) -> None:
    """Record, then take out. Says on stderr what was done. Hold the folder's lock."""
    words = read_words(listed)
    found = _found(folder, words)
    unknown = sorted(words - set(found["asked"].to_pylist()))
    if not len(found):
        raise UserError(
            f"remove={listed}: none of {len(words)} is an id, uri or SHA-256 of a picture in {folder}"
        )
    before = taken(folder)
    fresh = found.filter(pc.invert(pc.is_in(found["id"], value_set=before["id"].combine_chunks())))
    write_table(folder / FILE, pa.concat_tables([before, fresh]))
    remove_leftovers(folder, deep=True)  # they may hold what is to go
    changed, pictures = _rewrite(folder, taken(folder)["id"].combine_chunks())
    unknown_too = f"; {len(unknown)} unknown, such as {unknown[0]}" if unknown else ""
    done = f"{len(found)} pictures named, {pictures} taken out of {changed} shards{unknown_too}"
    print(f"{done}; see {folder / FILE}", file=sys.stderr)


def taken(folder: Path) -> pa.Table:
    """What has been taken out of this folder: a table of SCHEMA."""
    path = folder / FILE
    return parquet.read_table(path) if path.exists() else SCHEMA.empty_table()


def read_words(path: Path) -> set[str]:
    """The ids, uris and hashes of a list.

    Raises:
        UserError: it cannot be read, is empty, or has no column of these.
    """
    try:
        if path.suffix in (".csv", ".parquet"):
            table = csv.read_csv(path) if path.suffix == ".csv" else parquet.read_table(path)
            columns = [name for name in WORDS if name in table.column_names]
            words = {str(word) for name in columns for word in table[name].to_pylist() if word is not None}
        else:
            lines = (line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines())
            words = {line for line in lines if line and not line.startswith("#")}
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise UserError(f"remove={path} cannot be read: {str(error).splitlines()[0]}") from None
    if not words:
        raise UserError(f"remove={path} names no picture; give lines, or columns {', '.join(WORDS)}")
    return words


def _found(folder: Path, words: set[str]) -> pa.Table:
    """The pictures of the pool, kept or not, that a word names: a table of SCHEMA."""
    manifest = read_manifest(folder / "manifest.parquet", list(WORDS))
    tables = []
    rest = read_format(folder / "decisions.parquet", DECISIONS_SCHEMA, ["id", "uri"])
    for part in sorted((folder / "stages" / "ingest" / "pool").glob("*.parquet")):
        known = parquet.read_table(part, columns=["id", "sha256", "pixel_sha256"])
        tables.append(known.join(rest, "id", join_type="inner"))
    tables.append(manifest)  # whose hashes are others where faces were blurred
    listed = pa.array(sorted(words), pa.large_string())
    rows = {}
    for table in tables:
        for name in WORDS:
            hit = table.filter(pc.is_in(table[name].cast(pa.large_string()), value_set=listed))
            for row in hit.to_pylist():
                rows.setdefault(row["id"], {**row, "asked": row[name]})
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return pa.Table.from_pylist([{**rows[name], "on": today} for name in sorted(rows)], schema=SCHEMA)


def _rewrite(folder: Path, ids: pa.Array) -> tuple[int, int]:
    """Shards without these pictures, a manifest and decisions to match; how many shards and pictures."""
    manifest = read_manifest(folder / "manifest.parquet")
    gone = pc.is_in(manifest["id"], value_set=ids)
    shards = pc.unique(manifest.filter(gone)["shard"]).to_pylist()
    kept = manifest.filter(pc.invert(gone))
    places = {column: kept[column].to_pylist() for column in ("shard", "offset", "size")}
    row_of = {name: row for row, name in enumerate(kept["id"].to_pylist())}
    out = set(ids.to_pylist())
    for shard in shards:
        path = folder / _revised(shard)
        samples = list(_samples(folder / shard, out))
        if samples:
            for sample, (offset, size) in zip(samples, write_shard(path, samples), strict=True):
                row = row_of[sample.id]
                places["shard"][row], places["offset"][row] = _revised(shard), offset
                places["size"][row] = size
    for name, values in places.items():
        column = pa.array(values, kept.schema.field(name).type)
        kept = kept.set_column(kept.schema.get_field_index(name), name, column)
    if not len(kept):
        raise UserError(f"nothing would be left in {folder}; delete the folder instead")
    write_manifest(folder / "manifest.parquet", kept)
    named = {name.as_py() for name in pc.unique(kept["shard"])}
    for path in (folder / "shards").glob("*.tar"):  # those of a run that was killed before this, too
        if f"shards/{path.name}" not in named:
            path.unlink()
    _decide(folder, ids)
    return len(shards), int(pc.sum(gone).as_py() or 0)


def _decide(folder: Path, ids: pa.Array) -> None:
    """Decisions say so; the write stage knows that its shards are no longer as it left them; looks go."""
    decisions = read_format(folder / "decisions.parquet", DECISIONS_SCHEMA)
    hit = pc.is_in(decisions["id"], value_set=ids)
    columns = {
        "kept": pc.and_(decisions["kept"], pc.invert(hit)),
        "dropped_by": pc.if_else(hit, "takedown", decisions["dropped_by"]),
    }
    for name, column in columns.items():
        decisions = decisions.set_column(decisions.schema.get_field_index(name), name, column)
    write_format(folder / "decisions.parquet", decisions, DECISIONS_SCHEMA)
    begun = folder / "stages" / "write" / "begun.json"
    if begun.exists():
        write_json(begun, {**read_json(begun), "taken": len(ids)})
    for part in sorted((folder / "stages" / "ingest" / "pool").glob("*.parquet")):
        _blank(part, ids)
    _blank_copies(folder / "stages", ids)
    (folder / "report.html").unlink(missing_ok=True)
    shutil.rmtree(folder / "report", ignore_errors=True)


def _blank(part: Path, ids: pa.Array) -> None:
    table = parquet.read_table(part, columns=["id", "error"])
    readable = table.filter(table["error"].is_null())
    rows = pc.is_in(readable["id"], value_set=ids).to_numpy()
    _zero(part.with_suffix(".thumbs.npy"), rows)


def _blank_copies(stages: Path, ids: pa.Array) -> None:
    """Of the pictures that were copied to calibrate thresholds."""
    copied = sorted((stages / "calibrate" / "copies").glob("*.parquet"))
    if not copied:
        return
    parts = [
        parquet.read_table(part, columns=["id", "error"])
        for part in sorted((stages / "ingest" / "pool").glob("*.parquet"))
    ]
    read = pa.concat_tables(parts)
    names = read.filter(read["error"].is_null())["id"]
    for part in copied:
        rows = parquet.read_table(part, columns=["row"])["row"]
        _zero(part.with_suffix(".thumbs.npy"), pc.is_in(names.take(rows), value_set=ids).to_numpy())


def _zero(path: Path, rows: np.ndarray) -> None:
    if rows.any() and path.exists():
        thumbs = np.load(path)
        thumbs[rows] = 0
        with write_whole(path) as file:
            np.save(file, thumbs)


def _revised(shard: str) -> str:
    """The name of a shard's next version: 000003.tar, 000003-1.tar, 000003-2.tar."""
    parts = REVISED.fullmatch(shard)
    if parts is None:
        raise UserError(f"{shard} is no shard that curation wrote")
    return f"{parts[1]}-{int(parts[2] or 0) + 1}.tar"


def _samples(path: Path, out: set[str]) -> Iterator[ShardSample]:
    """The samples of a shard but for those with these ids."""
    with tarfile.open(path) as tar:
        members: dict[str, dict[str, bytes]] = {}
        for member in tar:
            name, _, extension = member.name.partition(".")
            file = tar.extractfile(member)
            if name not in out and file is not None:
                members.setdefault(name, {})[extension] = file.read()
    for name, parts in members.items():
        facts = json.loads(parts.pop("json"))
        parts.pop("cls", None)
        ((extension, data),) = parts.items()
        yield ShardSample(name, extension, data, facts, facts.pop("label", None))
