"""Lists of pictures: a text file with a path a line, or CSV or Parquet with a column of paths."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv, parquet

from dinov2.data.cache import is_url
from dinov2.data.manifest import declared_format
from dinov2.data.tars import on_disk
from dinov2.data.trees import known_splits
from dinov2.exits import UserError

EXTENSIONS = (".txt", ".lst", ".csv", ".tsv", ".parquet")
PATH_COLUMNS = ("uri", "path", "file")
COLUMNS = {
    "uri": PATH_COLUMNS,
    "label": ("label", "cls", "class"),
    "split": ("split",),
    "licence": ("licence", "license"),
    "consent": ("consent",),
}


def read_list(path: Path) -> pa.Table:
    """Read a list: columns uri (as written), label, split, licence, consent, sorted by uri, each uri once.

    Column names count without regard to case. Columns with other names are left aside.

    Raises:
        UserError: the file cannot be read, or has no column of paths.
    """
    try:
        return _listed(path, _read(path))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a list: {str(error).splitlines()[0]}") from None


def _listed(path: Path, table: pa.Table) -> pa.Table:
    chosen = {name: _column(table, aliases) for name, aliases in COLUMNS.items()}
    if chosen["uri"] is None:
        found = ", ".join(table.column_names)
        raise UserError(f"{path} has no column of paths: name one uri, path or file (it has: {found})")
    columns = {name: _strings(table, column) for name, column in chosen.items()}
    listed = pa.table({**columns, "split": known_splits(columns["split"])})
    listed = listed.filter(pc.fill_null(pc.not_equal(listed["uri"], ""), False))
    return _each_once(listed.take(pc.sort_indices(listed["uri"])))


def sizes_of(uris: pa.ChunkedArray, folder: str, path: Path) -> pa.Array:
    """Size of each listed file in bytes; null where it is remote or missing.

    Raises:
        UserError: none of the files exists.
    """
    sizes = [_size(os.path.join(folder, on_disk(uri))) for uri in uris.to_pylist()]
    if not any(size is not None for size in sizes) and not all(is_url(uri) for uri in uris.to_pylist()):
        raise UserError(f"none of the files listed in {path} exists; paths count from its folder: {uris[0]}")
    return pa.array(sizes, pa.int64())


def _read(path: Path) -> pa.Table:
    if path.suffix == ".parquet":
        schema = parquet.read_schema(path)
        declared = declared_format(schema)[0]
        if declared.startswith("dinov2."):
            raise UserError(f"{path} is {declared}, not a source of pictures; name a manifest or a list")
        wanted = {alias for aliases in COLUMNS.values() for alias in aliases}
        used = [name for name in schema.names if name.strip().lower() in wanted]
        return parquet.read_table(path, columns=used) if used else schema.empty_table()
    if path.suffix in (".csv", ".tsv"):
        return _read_csv(path)
    lines = (line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines())
    return pa.table({"uri": pa.array([line for line in lines if line and line[0] != "#"], pa.large_string())})


def _read_csv(path: Path) -> pa.Table:
    parsing = csv.ParseOptions(delimiter="\t" if path.suffix == ".tsv" else ",", newlines_in_values=True)
    with csv.open_csv(path, parse_options=parsing) as reader:
        names = reader.schema.names
    text = {name: pa.large_string() for name in names}  # a label 007 stays 007
    converting = csv.ConvertOptions(column_types=text, strings_can_be_null=True, null_values=[""])
    return csv.read_csv(path, parse_options=parsing, convert_options=converting)


def _column(table: pa.Table, aliases: tuple[str, ...]) -> str | None:
    by_name = {name.strip().lower(): name for name in table.column_names}
    return next((by_name[alias] for alias in aliases if alias in by_name), None)


def _strings(table: pa.Table, column: str | None) -> pa.ChunkedArray:
    if column is None:
        return pa.chunked_array([pa.nulls(len(table), pa.large_string())])
    return table[column].cast(pa.large_string())


def _each_once(table: pa.Table) -> pa.Table:
    """Of rows with the same uri, which lie together, the first."""
    if len(table) < 2:
        return table
    uris = table["uri"].combine_chunks()
    return table.filter(pa.concat_arrays([pa.array([True]), pc.not_equal(uris[1:], uris[:-1])]))


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None
