"""From what the user named to rows: one function a kind of source."""

import glob
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from dinov2.console import progress
from dinov2.data.cache import Cache, is_remote
from dinov2.data.decode import picture_extensions
from dinov2.data.lists import EXTENSIONS as LISTS
from dinov2.data.lists import read_list, sizes_of
from dinov2.data.manifest import MANIFEST_SCHEMA, declared_format, picture_ids, read_manifest
from dinov2.data.specs import SPLITS, Spec, expand_braces, fixed_folder, is_pattern
from dinov2.data.tars import TarIndex, indexed, printable
from dinov2.data.trees import known_splits, layout, walk
from dinov2.exits import UserError

CODED = pa.dictionary(pa.int32(), pa.string())
ROWS = pa.schema(
    {
        "id": pa.large_string(),
        "uri": pa.large_string(),
        "source": CODED,
        "label": CODED,
        "split": CODED,
        "path": CODED,
        "offset": pa.int64(),
        "size": pa.int64(),
        "licence": CODED,
        "consent": CODED,
    }
)
ARRAYS = ("npy",)  # pictures only where a folder has no others: many a folder has arrays beside its pictures
REMOTE_AT_ONCE = 8
WORTH_A_BAR = 64  # tars to index


def rows_of(spec: Spec, cache: Cache) -> pa.Table:
    """The rows (`ROWS`) of one source.

    Raises:
        UserError: the source is missing or corrupt. No row at all is no error here.
    """
    place = spec.place if is_remote(spec.place) else os.path.expanduser(spec.place)
    if is_remote(place):
        return _tars(spec, [place] if place.startswith("pipe:") else expand_braces(place), place, cache)
    if os.path.isdir(place):
        return _folder(spec, place, cache)
    if os.path.isfile(place):
        return _file(spec, place, cache)
    if is_pattern(place):
        return _pattern(spec, place, cache)
    raise UserError(f"the source {place} does not exist")


def _folder(spec: Spec, place: str, cache: Cache) -> pa.Table:
    manifest = Path(place, "manifest.parquet")
    if _is_manifest(manifest):
        return _manifest(manifest)
    found = walk(place)
    if not len(found.uri):
        if tars := sorted(glob.glob(glob.escape(place) + "/*.tar")):
            return _tars(spec, tars, f"{place.rstrip('/')}/*.tar", cache)
        found = walk(place, ARRAYS)
    split, label = layout(found.uri, _root_split(place))
    return _table(spec, found.uri, label=label, split=split, path=os.path.abspath(place), size=found.size)


def _file(spec: Spec, place: str, cache: Cache) -> pa.Table:
    base = os.path.basename(place).lower()
    if ".tar" in base or base.endswith(".tgz"):
        return _tars(spec, [place], place, cache)
    if _is_manifest(Path(place)):
        return _manifest(Path(place))
    if base.endswith(LISTS):
        return _list(spec, Path(place))
    if base.rpartition(".")[2] in picture_extensions().union(ARRAYS):
        return _pictures(spec, [place], os.path.dirname(place))
    raise UserError(
        f"{place} is no source: name a folder, tar, manifest, picture, or {', '.join(LISTS)} list"
    )


def _pattern(spec: Spec, pattern: str, cache: Cache) -> pa.Table:
    found = [path for one in expand_braces(pattern) for path in _matches(one)]
    if all(path.endswith(".tar") for path in found):
        return _tars(spec, found, pattern, cache)
    extensions = picture_extensions().union(ARRAYS)
    pictures = [path for path in found if path.rpartition(".")[2].lower() in extensions]
    if spec.inner or not pictures:
        raise UserError(f"{pattern} matches no tar and no picture")
    return _pictures(spec, sorted(pictures), fixed_folder(pattern))


def _matches(pattern: str) -> list[str]:
    if not glob.has_magic(pattern):
        if not os.path.exists(pattern):
            raise UserError(f"{pattern} does not exist")
        return [pattern]
    found = sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise UserError(f"nothing matches {pattern}")
    return found


def _pictures(spec: Spec, paths: list[str], folder: str) -> pa.Table:
    uri = pa.chunked_array([pa.array([printable(os.path.relpath(path, folder or ".")) for path in paths])])
    split, label = layout(uri, _root_split(folder))
    size = pa.array([os.path.getsize(path) for path in paths], pa.int64())
    return _table(spec, uri, label=label, split=split, path=os.path.abspath(folder), size=size)


def _tars(spec: Spec, addresses: list[str], pattern: str, cache: Cache) -> pa.Table:
    """Rows of tars. Of one tar, uris are its members' names; of several, the tar's name comes first."""
    several = is_pattern(pattern) and not pattern.startswith("pipe:")
    base = len(fixed_folder(pattern)) if several else 0
    parts = []
    for address, (source, found) in zip(addresses, _index_all(addresses, cache), strict=True):
        table = _inside(found.table, spec.inner)
        prefix = f"{address[base:]}/" if several else ""
        uri = _prepended(prefix, table["name"])
        grouped = pa.repeat(found.grouped, len(table))
        parts.append(table.append_column("uri", uri).append_column("path", _repeat(source, len(table))))
        parts[-1] = parts[-1].append_column("grouped", grouped)
    if not parts:
        return ROWS.empty_table()
    table = pa.concat_tables(parts)
    split, label = layout(table["name"], _root_split(spec.inner or pattern))
    return _table(
        spec,
        table["uri"],
        label=pc.if_else(table["grouped"], table["label"], label),
        split=pc.coalesce(known_splits(table["split"]), split),
        **{name: table[name] for name in ("path", "offset", "size", "licence", "consent")},
    )


def _index_all(addresses: list[str], cache: Cache) -> list[tuple[str, TarIndex]]:
    if len(addresses) < 2:
        return [indexed(address, cache) for address in addresses]
    at_once = REMOTE_AT_ONCE if is_remote(addresses[0]) else 1
    with ThreadPoolExecutor(at_once) as pool:
        work = pool.map(lambda address: indexed(address, cache), addresses)
        if len(addresses) < WORTH_A_BAR:
            return list(work)
        return list(progress(work, total=len(addresses), what="index tars", unit="tar"))


def _inside(table: pa.Table, folder: str) -> pa.Table:
    if not folder:
        return table
    table = table.filter(pc.starts_with(table["name"], folder + "/"))
    short = pc.utf8_slice_codeunits(table["name"], start=len(folder) + 1)
    return table.set_column(0, "name", short)


def _list(spec: Spec, path: Path) -> pa.Table:
    table = read_list(path)
    if not len(table):
        return ROWS.empty_table()
    folder = os.path.abspath(path.parent)
    size = sizes_of(table["uri"], folder, path)
    facts = {name: table[name] for name in ("label", "split", "licence", "consent")}
    return _table(spec, table["uri"], path=folder, size=size, **facts)


def _is_manifest(path: Path) -> bool:
    if path.suffix != ".parquet" or not path.is_file():
        return False
    try:
        return declared_format(parquet.read_schema(path))[0] == declared_format(MANIFEST_SCHEMA)[0]
    except (pa.ArrowInvalid, OSError):
        return path.name == "manifest.parquet"  # reading it will say what is wrong


def _manifest(path: Path) -> pa.Table:
    """Rows of a manifest in the order in which they lie in its shards."""
    table = read_manifest(path, ["shard", *(name for name in ROWS.names if name != "path")])
    loose = table["shard"].null_count
    if loose:
        raise UserError(
            f"{loose:,} of {len(table):,} pictures of {path} lie in no shard; finish the curation"
        )
    table = table.take(pc.sort_indices(table, [("shard", "ascending"), ("offset", "ascending")]))
    folder = os.path.abspath(path.parent)
    _check_shards(table, folder)
    path = _prepended(folder + "/", table["shard"])
    return table.append_column("path", path).select(ROWS.names).cast(ROWS)


def _check_shards(table: pa.Table, folder: str) -> None:
    ends = table.select(["shard"]).append_column("end", pc.add(table["offset"], table["size"]))
    for shard in ends.group_by("shard").aggregate([("end", "max")]).to_pylist():
        path = os.path.join(folder, shard["shard"])
        if not os.path.isfile(path):
            raise UserError(
                f"the shard {path} of the manifest does not exist; copy it, or run the curation again"
            )
        if os.path.getsize(path) < shard["end_max"]:
            raise UserError(
                f"the shard {path} is cut off: the manifest has pictures up to {shard['end_max']:,}"
            )


def _root_split(place: str) -> str | None:
    last = os.path.basename(os.path.abspath(place.rstrip("/"))).removesuffix(".tar")
    return SPLITS.get(last.lower())


def _prepended(prefix: str, texts: pa.ChunkedArray) -> pa.ChunkedArray:
    texts = texts.cast(pa.large_string())
    nothing = pa.scalar("", pa.large_string())
    return pc.binary_join_element_wise(pa.scalar(prefix, pa.large_string()), texts, nothing)


def _repeat(value: str | None, count: int) -> pa.Array:
    return pa.repeat(pa.scalar(value, pa.string()), count).dictionary_encode()


def _table(spec: Spec, uri: pa.ChunkedArray, **columns: "pa.ChunkedArray | pa.Array | str") -> pa.Table:
    """Rows with ids made from the source's name; columns that are left out are null, a text is repeated."""
    known = {"id": picture_ids(spec.name, uri), "uri": uri, "source": spec.name, **columns}
    for name in ROWS.names:
        value = known.get(name)
        if value is None or isinstance(value, str):
            known[name] = (
                pa.nulls(len(uri), ROWS.field(name).type) if value is None else _repeat(value, len(uri))
            )
    return pa.table({name: known[name] for name in ROWS.names}).cast(ROWS)
