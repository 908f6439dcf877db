"""What has been taken out of a folder (`takedowns.parquet`), and who goes with a picture that a list names.

Every picture of the pool with equal bytes or pixels goes, kept or not. So do those that curation took for
the same picture: the one that stayed of a group of copies and all that lost to it. If only the named one
went, the next run would let a copy take its place.
"""

import datetime
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import parquet

from curation.components import Components
from dinov2.data.manifest import DECISIONS_SCHEMA, read_format, read_manifest

FILE = "takedowns.parquet"
WORDS = ("id", "uri", "sha256", "pixel_sha256")
HASHES = ("sha256", "pixel_sha256")
NAMED, EQUAL, COPY = "named", "equal", "copy"
SCHEMA = pa.schema(
    {
        **dict.fromkeys(WORDS, pa.large_string()),
        "asked": pa.large_string(),  # the word of the list that named it, or one that it goes with
        "why": pa.string(),  # "named", "equal" in bytes or pixels to a named one, or a "copy" of one
        "on": pa.string(),  # UTC date
    }
)

Rows = NDArray[np.int64]


def taken(folder: Path) -> pa.Table:
    """What has been taken out of this folder: a table of SCHEMA."""
    path = folder / FILE
    found = [parquet.read_table(path)] if path.exists() else []
    return pa.concat_tables([SCHEMA.empty_table(), *found], promote_options="default")


def among(table: pa.Table, record: pa.Table) -> NDArray[np.bool_]:
    """[n] which pictures of a table are in the record, by id, or equal one there in bytes or pixels."""
    hit = np.zeros(len(table), bool)
    for name in ("id", *HASHES):
        known = record[name].combine_chunks().drop_null()
        hit |= pc.is_in(table[name], value_set=known).to_numpy()
    return hit


@dataclass(frozen=True)
class Going:
    """Rows for the record, sorted by id, and the words that name none of the pool."""

    table: pa.Table
    unknown: list[str]

    def count(self, why: str) -> int:
        return pc.sum(pc.equal(self.table["why"], why)).as_py() or 0


def going(folder: Path, words: set[str], *, copies: bool) -> Going:
    """Who goes if these words are taken out; with `copies` also the copies of whom they name.

    What an earlier list of the same words took out is named again, so that a killed command finds it.
    """
    pool = _pool(folder)
    asked, known = _named(folder, pool, words)
    group = _groups(folder, pool, copies=copies)
    named = np.array(sorted(asked), np.int64)
    word_of = {int(group[row]): asked[row] for row in reversed(named.tolist())}
    rows = np.flatnonzero(np.isin(group, group[named]))
    there = pool.take(pa.array(rows))
    equal = among(there, pool.take(pa.array(named)))
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    reasons = [
        {
            "asked": asked.get(row) or word_of[int(group[row])],
            "why": NAMED if row in asked else EQUAL if same else COPY,
            "on": today,
        }
        for row, same in zip(rows.tolist(), equal.tolist(), strict=True)
    ]
    found = [row | reason for row, reason in zip(there.to_pylist(), reasons, strict=True)]
    table = pa.Table.from_pylist(sorted(found, key=lambda row: row["id"]), schema=SCHEMA)
    return Going(table, sorted(words - known))


def parts_of(folder: Path, role: str) -> list[Path]:
    """What ingest left of a set; also of before its source changed, where that is not taken over yet."""
    return sorted(folder.glob(f"stages*/ingest/{role}/*.parquet"))


def _pool(folder: Path) -> pa.Table:
    """Columns WORDS of every picture that was decided on. Hashes are the original's, also of blurred ones."""
    pool = read_format(folder / "decisions.parquet", DECISIONS_SCHEMA, ["id", "uri"])
    parts = [parquet.read_table(part, columns=["id", *HASHES]) for part in parts_of(folder, "pool")]
    hashes = pa.concat_tables([SCHEMA.empty_table().select(["id", *HASHES]), *parts])
    place = _places(pool["id"], hashes)
    for name in HASHES:
        pool = pool.append_column(name, hashes[name].take(place))
    return pool.combine_chunks()


def _named(folder: Path, pool: pa.Table, words: set[str]) -> tuple[dict[int, str], set[str]]:
    """The word that names it, by row of the pool; and all words that name any."""
    before = taken(folder)
    before = before.filter(pc.invert(pc.is_in(before["why"], value_set=pa.array([EQUAL, COPY]))))
    manifest = read_manifest(folder / "manifest.parquet", list(WORDS))  # a blurred one's hashes are others
    listed = pa.array(sorted(words), pa.large_string())
    asked: dict[int, str] = {}
    known: set[str] = set()
    for table in (pool, manifest, before):
        for name in (*WORDS, "asked") if table is before else WORDS:
            hit = table.filter(pc.is_in(table[name].cast(pa.large_string()), value_set=listed))
            called = [str(word) for word in hit[name].to_pylist()]
            for row, word in zip(_places(hit["id"], pool).to_pylist(), called, strict=True):
                if row is not None:
                    asked.setdefault(row, word)
                    known.add(word)
    return asked, known


def _groups(folder: Path, pool: pa.Table, *, copies: bool) -> Rows:
    """[n] a number for each picture of the pool, the same for those that go together."""
    joined = Components(len(pool))
    for name in HASHES:
        code = pc.fill_null(pool[name].combine_chunks().dictionary_encode().indices, -1).to_numpy()
        rows = np.flatnonzero(code >= 0)
        _, first, place = np.unique(code[rows], return_index=True, return_inverse=True)
        joined.join(rows[first[place]], rows)
    for lost in _lost(folder) if copies else []:
        ends = [_places(lost[name], pool) for name in ("id", "evidence")]
        there = pc.and_(ends[0].is_valid(), ends[1].is_valid())
        joined.join(*(end.filter(there).to_numpy().astype(np.int64) for end in ends))
    return joined.labels().astype(np.int64)


def _lost(folder: Path) -> list[pa.Table]:
    """Who lost to which copy of it (id, evidence): as decided last, and as decisions and shards have it."""
    columns = ["id", "evidence", "dropped_by"]
    decisions = read_format(folder / "decisions.parquet", DECISIONS_SCHEMA, columns)
    path = folder / "stages" / "duplicates" / "dropped.parquet"
    latest = [parquet.read_table(path)] if path.exists() else []
    return [decisions.filter(pc.equal(decisions["dropped_by"], "duplicates")), *latest]


def _places(ids: pa.ChunkedArray, table: pa.Table) -> pa.Array:
    """Rows of a table with these ids; null for those it does not have."""
    found = pc.index_in(ids, value_set=table["id"].combine_chunks())
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found
