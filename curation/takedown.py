"""Take pictures out of a finished folder, as when consent is withdrawn: dinov2 curate remove=LIST output=DIR.

LIST is a text file with an id, a uri or a SHA-256 (of the file or of its pixels) a line, or CSV or Parquet
with columns of these names. Pictures with equal bytes or pixels go too, and so do copies (`curation.taken`).
Only the shards that hold such a picture are written again. What was taken out is in `takedowns.parquet`, and
stays out when the folder decides again or its pool grows. Its thumbnail is blanked and the report, which may
show it, goes (from_stage=report makes another); embeddings, hashes and names stay.

Killed at any moment, the same command goes on. A changed shard gets a new name, the manifest is replaced
whole, and only then the old shard goes: whoever reads the folder by its manifest sees one state or the other.
"""

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

from curation.taken import COPY, EQUAL, FILE, HASHES, NAMED, WORDS, Going, among, going, parts_of, taken
from dinov2.config import read, required
from dinov2.data.manifest import DECISIONS_SCHEMA, read_format, read_manifest, write_format, write_manifest
from dinov2.data.shards import ShardSample, write_shard
from dinov2.exits import UserError
from dinov2.files import lock, read_json, remove_leftovers, write_json, write_table, write_whole
from dinov2.folders import LOCK

SHA256 = re.compile(r"[0-9A-Fa-f]{64}")
REVISED = re.compile(r"(.*?)(?:-(\d+))?\.tar")


@dataclass(frozen=True, kw_only=True)
class TakedownConfig:
    remove: str = required()  # list of pictures by id, uri or SHA-256
    output: str = required()  # folder that curation has finished
    copies: bool = True  # also copies of them; off: only what has equal bytes or pixels


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
            take_out(folder, Path(config.remove), copies=config.copies)
    except BlockingIOError as error:
        raise UserError(f"output={folder} is in use by {error or 'another process'}") from None


def take_out(folder: Path, listed: Path, *, copies: bool = True) -> None:
    """Record, then take out. Says on stderr what was done. Hold the folder's lock.

    Raises:
        UserError: the list names none, or nothing would be left; then nothing has been changed.
    """
    words = read_words(listed)
    found = going(folder, words, copies=copies)
    if not len(found.table):
        raise UserError(
            f"remove={listed}: none of {len(words)} is an id, uri or SHA-256 of a picture in {folder}"
        )
    before = taken(folder)
    known = pc.is_in(found.table["id"], value_set=before["id"].combine_chunks())
    record = pa.concat_tables([before, found.table.filter(pc.invert(known))])
    ids = record["id"].combine_chunks()
    if pc.all(pc.is_in(read_manifest(folder / "manifest.parquet", ["id"])["id"], value_set=ids)).as_py():
        raise UserError(
            f"remove={listed} would leave nothing in {folder}, and nothing was taken out; "
            "delete the folder instead"
        )
    write_table(folder / FILE, record)
    remove_leftovers(folder, deep=True)  # they may hold what is to go
    changed, pictures = _rewrite(folder, record)
    print(f"{_said(found)}; {pictures} taken out of {changed} shards; see {folder / FILE}", file=sys.stderr)


def _said(found: Going) -> str:
    parts = [f"{found.count(NAMED)} pictures named"]
    if count := found.count(EQUAL):
        parts.append(f"{count} more with equal bytes or pixels")
    if count := found.count(COPY):
        parts.append(f"{count} more that are copies of these (copies=false leaves them)")
    if found.unknown:
        parts.append(f"{len(found.unknown)} unknown, such as {found.unknown[0]}")
    return ", ".join(parts)


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
    words = {word.lower() if SHA256.fullmatch(word) else word for word in words}
    if not words:
        raise UserError(f"remove={path} names no picture; give lines, or columns {', '.join(WORDS)}")
    return words


def _rewrite(folder: Path, record: pa.Table) -> tuple[int, int]:
    """Shards without these pictures, a manifest and decisions to match; how many shards and pictures."""
    ids = record["id"].combine_chunks()
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
    write_manifest(folder / "manifest.parquet", kept)
    named = {name.as_py() for name in pc.unique(kept["shard"])}
    for path in (folder / "shards").glob("*.tar"):  # those of a run that was killed before this, too
        if f"shards/{path.name}" not in named:
            path.unlink()
    _decide(folder, ids)
    _forget_looks(folder, record)
    return len(shards), int(pc.sum(gone).as_py() or 0)


def _decide(folder: Path, ids: pa.Array) -> None:
    """Decisions say what they would if made again; the write stage knows its shards have changed."""
    decisions = read_format(folder / "decisions.parquet", DECISIONS_SCHEMA)
    hit = pc.is_in(decisions["id"], value_set=ids)
    changed = {"kept": False, "dropped_by": "takedown", "evidence": None, "similarity": None, "error": None}
    for name, value in changed.items():
        field = decisions.schema.field(name)
        column = pc.if_else(hit, pa.scalar(value, field.type), decisions[name])
        decisions = decisions.set_column(decisions.schema.get_field_index(name), field, column)
    write_format(folder / "decisions.parquet", decisions, DECISIONS_SCHEMA)
    begun = folder / "stages" / "write" / "begun.json"
    if begun.exists():
        write_json(begun, {**read_json(begun), "taken": len(ids)})


def _forget_looks(folder: Path, record: pa.Table) -> None:
    """Blank the thumbnails of these pictures, also as seeds, and of copies made of them; the report goes."""
    for part in [*parts_of(folder, "pool"), *parts_of(folder, "seeds")]:
        table = parquet.read_table(part, columns=["id", *HASHES, "error"])
        _zero(part.with_suffix(".thumbs.npy"), among(table.filter(table["error"].is_null()), record))
    _blank_copies(folder / "stages", record["id"].combine_chunks())
    (folder / "report.html").unlink(missing_ok=True)
    shutil.rmtree(folder / "report", ignore_errors=True)


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
