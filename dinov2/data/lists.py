"""Lists of pictures: a text file with a path a line, or CSV or Parquet with a column of paths."""

import os
from difflib import get_close_matches
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv, parquet

from dinov2.data.cache import is_url
from dinov2.data.manifest import declared_format
from dinov2.data.tars import on_disk
from dinov2.data.trees import known_splits
from dinov2.exits import UserError

EXTENSIONS = (".txt", ".lst", ".csv", ".tsv", ".parquet")
FILE = "file://"
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

    Column names count without regard to case. Columns of other names are left aside.

    Raises:
        UserError: the file cannot be read, has no column of paths, lists tars, or misspells a column.
    """
    try:
        columns = _read(path)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a list: {str(error).splitlines()[0]}") from None
    nothing = pa.chunked_array([pa.nulls(len(columns["uri"]), pa.large_string())])
    listed = pa.table({name: columns.get(name, nothing) for name in COLUMNS})
    listed = listed.set_column(listed.schema.get_field_index("split"), "split", known_splits(listed["split"]))
    listed = listed.filter(pc.fill_null(pc.not_equal(listed["uri"], ""), False))
    if pc.any(pc.ends_with(listed["uri"], ".tar")).as_py():
        raise UserError(
            f"{path} lists tars; name those by a glob, by braces ({{000..127}}), or joined by commas"
        )
    return _each_once(listed.take(pc.sort_indices(listed["uri"])))


def place_of(folder: str, uri: str) -> str:
    """Where a picture lies that has this uri: a path from `folder`, an absolute one, or a `file://` URL."""
    if uri.startswith(FILE):
        return on_disk(unquote(uri.removeprefix(FILE).removeprefix("localhost"), errors="surrogateescape"))
    return os.path.join(folder, on_disk(uri))


def sizes_of(uris: pa.ChunkedArray, folder: str, path: Path) -> pa.Array:
    """Size of each listed file in bytes; null where it is remote or missing.

    Raises:
        UserError: none of the files exists.
    """
    sizes = [_size(place_of(folder, uri)) for uri in uris.to_pylist()]
    if not any(size is not None for size in sizes) and not all(is_url(uri) for uri in uris.to_pylist()):
        raise UserError(f"none of the files listed in {path} exists; paths count from its folder: {uris[0]}")
    return pa.array(sizes, pa.int64())


def _read(path: Path) -> dict[str, pa.ChunkedArray]:
    """The columns of `COLUMNS` that the list has, as 64-bit strings."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        schema = parquet.read_schema(path)
        declared = declared_format(schema)[0]
        if declared.startswith("dinov2."):
            raise UserError(f"{path} is {declared}, not a source of pictures; name a manifest or a list")
        chosen = _chosen(path, schema.names)
        table = parquet.read_table(path, columns=list(chosen.values()))
    elif kind in (".csv", ".tsv"):
        parsing = csv.ParseOptions(delimiter="\t" if kind == ".tsv" else ",", newlines_in_values=True)
        with csv.open_csv(path, parse_options=parsing) as reader:
            chosen = _chosen(path, reader.schema.names)
        used = list(chosen.values())
        converting = csv.ConvertOptions(
            include_columns=used,
            column_types=dict.fromkeys(used, pa.large_string()),  # a label 007 stays 007
            strings_can_be_null=True,
            null_values=[""],
        )
        table = csv.read_csv(path, parse_options=parsing, convert_options=converting)
    else:
        lines = (line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines())
        chosen, table = {"uri": "uri"}, pa.table({"uri": [line for line in lines if line and line[0] != "#"]})
    return {name: table[column].cast(pa.large_string()) for name, column in chosen.items()}


def _chosen(path: Path, names: list[str]) -> dict[str, str]:
    """Which of the list's columns gives which of ours."""
    by_name = {name.strip().lower(): name for name in names}
    chosen = {
        ours: by_name[alias]
        for ours, aliases in COLUMNS.items()
        for alias in reversed(aliases)
        if alias in by_name
    }
    if "uri" not in chosen:
        raise UserError(
            f"{path} has no column of paths: name one uri, path or file (it has: {', '.join(names)})"
        )
    for ours in sorted(COLUMNS.keys() - chosen):
        near = get_close_matches(ours, by_name.keys() - set(chosen.values()), n=1, cutoff=0.8)
        if near:
            raise UserError(f"{path} has a column {by_name[near[0]]!r}: call it {ours!r}, or something else")
    return chosen


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
