"""The Parquet tables that stages pass to one another: manifest, decisions, edges, clusters.

Each file carries `format` and `format_version` ("major.minor") in its schema metadata. A reader accepts its
own major version, whatever the minor one: columns that a later minor version has added are kept and ignored.
Long columns (ids, uris, hashes) are 64-bit strings in memory, so that 100 million rows can be sorted.
"""

import hashlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from dinov2.exits import UserError
from dinov2.files import write_table

FORMAT, VERSION = b"format", b"format_version"
ID_DIGITS = 16


def table_format(name: str, columns: dict[str, pa.DataType], version: str = "1.0") -> pa.Schema:
    """A schema that says which format it is."""
    return pa.schema(list(columns.items()), metadata={FORMAT: name, VERSION: version})


MANIFEST_SCHEMA = table_format(
    "dinov2.manifest",
    {
        "id": pa.large_string(),
        "uri": pa.large_string(),
        "source": pa.string(),
        "sha256": pa.large_string(),
        "pixel_sha256": pa.large_string(),
        "shard": pa.string(),  # relative to the manifest's folder; null while not in a shard
        "offset": pa.int64(),  # of the payload, not of the tar header
        "size": pa.int64(),
        "format": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "label": pa.string(),
        "split": pa.string(),
        "phash": pa.uint64(),
        "pca_hash": pa.uint64(),
        "licence": pa.string(),
        "consent": pa.string(),
        "flags": pa.list_(pa.string()),
    },
)
DECISIONS_SCHEMA = table_format(
    "dinov2.decisions",
    {
        "id": pa.large_string(),
        "uri": pa.large_string(),
        "kept": pa.bool_(),
        "dropped_by": pa.string(),  # name of the stage
        "evidence": pa.large_string(),  # id it lost to
        "similarity": pa.float32(),
        "error": pa.string(),
    },
)
EDGES_SCHEMA = table_format(
    "dinov2.edges",
    {
        "a": pa.large_string(),
        "b": pa.large_string(),
        "similarity": pa.float32(),
        "kind": pa.string(),  # duplicate, holdout or retrieval
    },
)


def clusters_schema(levels: int) -> pa.Schema:
    """Clusters with columns level_0 (finest) to level_{levels-1}; distance is to the finest centroid."""
    columns = {f"level_{level}": pa.int64() for level in range(levels)}
    return table_format("dinov2.clusters", {"id": pa.large_string(), **columns, "distance": pa.float32()})


CLUSTERS_SCHEMA = clusters_schema(0)  # for reading a table of any number of levels


def write_format(path: Path | str, table: pa.Table, schema: pa.Schema) -> None:
    """Write a table in a format, whole; equal rows give equal bytes.

    Args:
        table: has exactly the schema's columns in any order; types are cast, without loss or not at all.
    """
    if set(table.column_names) != set(schema.names):
        wrong = sorted(set(table.column_names) ^ set(schema.names))
        raise ValueError(f"{_name(schema)} has the columns {schema.names}; missing or unknown: {wrong}")
    table = table.select(schema.names).replace_schema_metadata(None)
    table = table.cast(schema.remove_metadata()).combine_chunks()
    write_table(path, table.replace_schema_metadata(schema.metadata))


def read_format(path: Path | str, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
    """Read a table, or a folder of Parquet files in the order of their names, of the given format.

    Raises:
        UserError: no such file, not Parquet, another format, or another major version.
    """
    path = Path(path)
    parts = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not parts:
        raise UserError(f"{path} holds no .parquet file")
    return pa.concat_tables([_read_part(part, schema, columns) for part in parts])


def write_manifest(path: Path | str, table: pa.Table) -> None:
    """Write a manifest, sorted by id."""
    write_format(path, table.take(pc.sort_indices(table["id"])), MANIFEST_SCHEMA)


def read_manifest(path: Path | str, columns: list[str] | None = None) -> pa.Table:
    """Read a manifest: rows sorted by id. Errors as in `read_format`."""
    return read_format(path, MANIFEST_SCHEMA, columns)


def declared_format(schema: pa.Schema) -> tuple[str, str]:
    """Name and version that a Parquet file's schema declares; empty strings for somebody else's file."""
    metadata = schema.metadata or {}
    return metadata.get(FORMAT, b"").decode(), metadata.get(VERSION, b"").decode()


def picture_id(source: str, uri: str) -> str:
    """The first 16 hex digits of sha256(source + "/" + uri): one picture's name in every table."""
    return hashlib.sha256(f"{source}/{uri}".encode()).hexdigest()[:ID_DIGITS]


def picture_ids(source: str, uris: pa.Array | pa.ChunkedArray) -> pa.ChunkedArray:
    """`picture_id` of every uri, as 64-bit strings: about 1 µs a row, no Python string per row."""
    column = uris if isinstance(uris, pa.ChunkedArray) else pa.chunked_array([uris])
    chunks = [
        _ids_of_chunk(f"{source}/".encode(), chunk.slice(start, 1 << 20).cast(pa.large_string()))
        for chunk in column.chunks
        for start in range(0, len(chunk), 1 << 20)
    ]
    return pa.chunked_array(chunks, type=pa.large_string())


def _ids_of_chunk(prefix: bytes, uris: pa.Array) -> pa.Array:
    _, ends, text = uris.buffers()
    if len(uris) == 0 or text is None:
        return pa.array([picture_id(prefix.decode()[:-1], "")] * len(uris), pa.large_string())
    view = memoryview(text)
    bounds = np.frombuffer(ends, np.int64)[uris.offset : uris.offset + len(uris) + 1].tolist()
    sha256 = hashlib.sha256
    digests = b"".join([sha256(prefix + view[a:b]).digest()[: ID_DIGITS // 2] for a, b in pairwise(bounds)])
    ends = pa.py_buffer(np.arange(len(uris) + 1, dtype=np.int64) * ID_DIGITS)
    return pa.LargeStringArray.from_buffers(len(uris), ends, pa.py_buffer(digests.hex().encode()))


def _read_part(path: Path, schema: pa.Schema, columns: list[str] | None) -> pa.Table:
    try:
        file = parquet.ParquetFile(path)
        _check_format(path, file.schema_arrow, schema)
        return file.read(columns)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None


def _check_format(path: Path, found: pa.Schema, wanted: pa.Schema) -> None:
    name, version = declared_format(found)
    if name != _name(wanted):
        raise UserError(f"{path} is {name or 'not a file of ours'}, not {_name(wanted)}")
    _, ours = declared_format(wanted)
    if version.partition(".")[0] != ours.partition(".")[0]:
        raise UserError(f"{path} has {name} version {version}; this program reads {ours.partition('.')[0]}.x")
    missing = sorted(set(wanted.names) - set(found.names))
    if missing:
        raise UserError(f"{path} lacks the columns {', '.join(missing)} of {name}; make it again")


def _name(schema: pa.Schema) -> str:
    return declared_format(schema)[0]
