"""Table formats: ids as the contract says, bytes that depend on the rows alone, versions that are checked."""

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from dinov2.data.manifest import (
    CLUSTERS_SCHEMA,
    DECISIONS_SCHEMA,
    EDGES_SCHEMA,
    MANIFEST_SCHEMA,
    clusters_schema,
    picture_id,
    picture_ids,
    read_format,
    read_manifest,
    table_format,
    write_format,
    write_manifest,
)
from dinov2.exits import UserError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(source=TEXT, uris=st.lists(TEXT, max_size=8), first=st.integers(0, 8))
def test_ids_are_the_contract_s(source: str, uris: list[str], first: int) -> None:
    wanted = [hashlib.sha256(f"{source}/{uri}".encode()).hexdigest()[:16] for uri in uris]
    assert [picture_id(source, uri) for uri in uris] == wanted
    chunks = pa.chunked_array(
        [pa.array(uris, pa.string()), pa.array([], pa.string()), pa.array(uris).cast("string")]
    )
    assert picture_ids(source, chunks).to_pylist() == wanted * 2
    assert picture_ids(source, pa.array(uris, pa.large_string()).slice(first)).to_pylist() == wanted[first:]


def test_a_manifest_is_sorted_and_its_bytes_depend_on_its_rows_alone(tmp_path: Path) -> None:
    rows = [_row(number) for number in range(50)]
    table = pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)
    write_manifest(tmp_path / "a", table)
    mixed = pa.concat_tables([table.slice(30), table.slice(0, 10), table.slice(10, 20)])
    plain = mixed.cast(pa.schema([(f.name, _plain(f.type)) for f in MANIFEST_SCHEMA]))
    write_manifest(tmp_path / "b", plain.select(sorted(plain.column_names)))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    read = read_manifest(tmp_path / "a")
    assert read.to_pylist() == sorted(rows, key=lambda row: str(row["id"]))
    assert read.schema.equals(MANIFEST_SCHEMA)
    assert read_manifest(tmp_path / "a", ["shard", "id"]).column_names == ["shard", "id"]


def test_formats_come_back_as_they_were(tmp_path: Path) -> None:
    decision = {"id": ["a"], "uri": ["u"], "kept": [False], "dropped_by": ["duplicates"], "evidence": ["b"]}
    edge = {"a": ["a"], "b": ["b"], "similarity": [0.5], "kind": ["duplicate"]}
    cluster = {"id": ["a"], "level_0": [7], "level_1": [1], "distance": [0.5]}
    for written, read, columns in (
        (DECISIONS_SCHEMA, DECISIONS_SCHEMA, {**decision, "similarity": [0.5], "error": [None]}),
        (EDGES_SCHEMA, EDGES_SCHEMA, edge),
        (clusters_schema(2), CLUSTERS_SCHEMA, cluster),
    ):
        write_format(tmp_path / "x.parquet", pa.table(columns), written)
        assert read_format(tmp_path / "x.parquet", read).to_pydict() == columns


def test_a_folder_of_parts_is_one_table(tmp_path: Path) -> None:
    for part in ("b", "a"):
        table = pa.table({"a": [part], "b": ["x"], "similarity": [1.0], "kind": ["holdout"]})
        write_format(tmp_path / f"{part}.parquet", table, EDGES_SCHEMA)
    assert read_format(tmp_path, EDGES_SCHEMA)["a"].to_pylist() == ["a", "b"]


def test_a_later_minor_version_is_read_and_everything_else_is_named(tmp_path: Path) -> None:
    columns = {field.name: field.type for field in EDGES_SCHEMA}
    row = {"a": ["a"], "b": ["b"], "similarity": [1.0], "kind": ["duplicate"], "new": [3]}
    path = tmp_path / "edges.parquet"

    later = table_format("dinov2.edges", {**columns, "new": pa.int64()}, "1.7")
    parquet.write_table(pa.table(row, schema=later), path)
    assert read_format(path, EDGES_SCHEMA)["new"].to_pylist() == [3]

    other_major = table_format("dinov2.edges", {**columns, "new": pa.int64()}, "2.0")
    parquet.write_table(pa.table(row, schema=other_major), path)
    with pytest.raises(
        UserError, match=r"edges.parquet has dinov2.edges version 2.0; this program reads 1.x"
    ):
        read_format(path, EDGES_SCHEMA)
    with pytest.raises(UserError, match=r"is dinov2.edges, not dinov2.decisions"):
        read_format(path, DECISIONS_SCHEMA)

    parquet.write_table(pa.table({"a": ["a"]}, schema=table_format("dinov2.edges", {"a": pa.string()})), path)
    with pytest.raises(UserError, match="lacks the columns b, kind, similarity"):
        read_format(path, EDGES_SCHEMA)
    parquet.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(UserError, match="not a file of ours"):
        read_format(path, EDGES_SCHEMA)
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        read_format(path, EDGES_SCHEMA)
    with pytest.raises(UserError, match="does not exist"):
        read_format(tmp_path / "none.parquet", EDGES_SCHEMA)


def test_a_writer_s_mistake_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing or unknown: \['kind', 'sort'\]"):
        write_format(
            tmp_path / "x", pa.table({"a": ["a"], "b": ["b"], "similarity": [1.0], "sort": [1]}), EDGES_SCHEMA
        )
    wrong = pa.table({"a": ["a"], "b": ["b"], "similarity": ["high"], "kind": ["holdout"]})
    with pytest.raises(pa.ArrowInvalid):
        write_format(tmp_path / "x", wrong, EDGES_SCHEMA)
    assert not list(tmp_path.iterdir())


def _row(number: int) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(MANIFEST_SCHEMA.names)
    uri = f"{number}.jpg"
    known = {
        "uri": uri,
        "id": picture_id("s", uri),
        "phash": 2**64 - 1 - number,
        "flags": ["small"] * (number % 3),
    }
    return {**row, **known, "offset": 2**40 + number, "label": "x" if number % 2 else None}


def _plain(kind: pa.DataType) -> pa.DataType:
    return pa.string() if pa.types.is_large_string(kind) else kind
