"""Sources of pictures: a table of where each picture's bytes lie, and a way to read them.

Whatever the user names (folders, tars, lists, manifests, URLs) becomes one Arrow table; see `open_source`.
"""

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dinov2.data.cache import Cache, OpenFiles, is_url
from dinov2.data.decode import Unreadable
from dinov2.data.gather import rows_of
from dinov2.data.lists import place_of
from dinov2.data.specs import SPLITS, Spec, parse
from dinov2.exits import UserError
from dinov2.files import write_whole

INLINE = 1 << 20  # bytes of table up to which a source travels inside its pickle


class Source:
    """Pictures that can be read by row number.

    Attributes:
        name: what the source is called; several joined by commas are joined by "+".
        table: one row a picture (`dinov2.data.gather.ROWS`): id, uri, source, label, split, path, offset,
            size, licence, consent. With an offset, the bytes are `size` bytes of the tar `path` from there.
            Without one, they are the file `path`/`uri`, or `uri` itself where that is absolute or a URL.
        parts: of a source as it was opened, the name and number of rows of each that was joined, in order.

    Pickles stay small: a table of more than a mebibyte is left in the cache folder and memory-mapped by the
    process that unpickles it, so that workers share one copy. Reading is safe in many threads and processes.
    """

    def __init__(self, name: str, table: pa.Table, files: OpenFiles) -> None:
        self.name = name
        self.table = table.unify_dictionaries().combine_chunks()
        self.parts = {name: len(table)}
        self._files = files

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        return f"Source({self.name!r}, {len(self):,} pictures)"

    @property
    def ids(self) -> list[str]:
        return self.table["id"].to_pylist()

    def labels(self) -> list[str | None]:
        return self.table["label"].to_pylist()

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all ids and sizes in order: changes when pictures come, go or change their size."""
        digest = hashlib.sha256()
        for chunk in self.table["id"].chunks:
            for start in range(0, len(chunk), 1 << 20):
                digest.update("".join(chunk.slice(start, 1 << 20).to_pylist()).encode())
        digest.update(pc.fill_null(self.table["size"], -1).to_numpy().tobytes())
        return digest.hexdigest()[:32]

    def read(self, row: int) -> bytes:
        """The bytes of one picture as they lie in the source.

        Raises:
            Unreadable: the file is missing, shorter than the index says, or cannot be fetched or read.
        """
        where: dict[str, Any] = {name: self.table[name][row].as_py() for name in ("path", "offset", "size")}
        try:
            if where["offset"] is None:
                return self._whole(where["path"], self.table["uri"][row].as_py())
            return self._part(**where)
        except OSError as error:
            raise Unreadable(error.strerror or str(error)) from error

    def file(self, row: int) -> Path | None:
        """The file on this machine that a picture, or the tar with it, lies in; None where there is none."""
        path, offset, uri = (self.table[name][row].as_py() for name in ("path", "offset", "uri"))
        file = Path(path if offset is not None else place_of(path, uri))
        return file if file.is_file() else None

    def select(self, rows: Sequence[int] | np.ndarray | pa.Array) -> "Source":
        """The same source with these rows only, in this order."""
        indices = rows if isinstance(rows, pa.Array) else pa.array(np.asarray(rows, dtype=np.int64))
        return Source(self.name, _trimmed(self.table.take(indices)), self._files)

    def labelled(self, labels: Sequence[str | None]) -> "Source":
        """The same source with these labels, one a picture."""
        place = self.table.schema.get_field_index("label")
        column = pa.array(labels, pa.string()).dictionary_encode().cast(self.table.schema.field(place).type)
        return Source(self.name, self.table.set_column(place, self.table.field(place), column), self._files)

    def _whole(self, folder: str, uri: str) -> bytes:
        if is_url(uri):
            with self._files.cache.open(uri) as file:
                return file.readall()
        with open(place_of(folder, uri), "rb") as file:
            return file.read()

    def _part(self, path: str, offset: int, size: int) -> bytes:
        file = self._files.get(path)
        try:
            data = os.pread(file.fileno(), size, offset)
        except OSError:  # a file server may have let go of a file that was open for long
            self._files.forget(path)
            file = self._files.get(path)
            data = os.pread(file.fileno(), size, offset)
        if len(data) != size:
            raise Unreadable(f"{path} ends after {len(data):,} of the {size:,} bytes of this picture")
        return data

    def __reduce__(self) -> tuple[Any, ...]:
        if self.table.nbytes > INLINE:
            with suppress(OSError):  # no cache folder can be written: send the table itself
                return _from_file, (self.name, str(self._left_in_cache()), self._files)
        return _from_bytes, (self.name, _as_bytes(self.table), self._files)

    def _left_in_cache(self) -> Path:
        path = self._files.cache.table_path(self.fingerprint)
        if path.exists():
            os.utime(path)
        else:
            with write_whole(path) as file, pa.ipc.new_file(file, self.table.schema) as writer:
                writer.write_table(self.table)
        return path


def open_source(
    spec: str, *, cache: Path | str | None = None, cache_limit: int | None = None, split: str | None = None
) -> Source:
    """Open what the user named.

    Args:
        spec: one of, or several joined by commas, each optionally called NAME by writing NAME=…:
            - a folder tree of pictures, a picture, or a folder of tars, or of .npy arrays alone;
            - a tar, tars by a glob or a brace range (`pool-{000..127}.tar`), or a folder inside them
              (`pool.tar/train`): WebDataset tars of anybody, or plain ones of folder trees;
            - a manifest, or a folder that curation wrote (its ids and source names are kept);
            - a list: text with a path a line and # for comments, or CSV or Parquet with a column uri, path or
              file, and as you like label, split, licence and consent; paths count from the list's folder,
              and may be http(s):// and file:// URLs;
            - tars behind http(s) URLs, with braces, or `pipe:COMMAND` whose output is a tar.
        cache: folder for tar indexes and remote copies; default $XDG_CACHE_HOME/dinov2 or ~/.cache/dinov2.
        cache_limit: bytes of remote copies to keep; default 64 GiB.
        split: keep only this split (train, val or test, or what a list's split column says).

    In folder trees and plain tars the first folder is the label; where all first folders are named train, val
    or test, it is the split, and the label is below it. Rows are sorted by uri, in a manifest by their place.

    Raises:
        UserError: something is missing, empty, corrupt, or named twice.
    """
    files = OpenFiles(Cache(cache) if cache_limit is None else Cache(cache, cache_limit))
    specs = parse(spec)
    tables = [_rows(one, files.cache) for one in specs]
    source = Source("+".join(one.name for one in specs), pa.concat_tables(tables), files)
    source.parts = {one.name: len(table) for one, table in zip(specs, tables, strict=True)}
    _check_ids(source)
    return source if split is None else _only_split(source, split)


def _rows(spec: Spec, cache: Cache) -> pa.Table:
    table = rows_of(spec, cache)
    if not len(table):
        where = f"{spec.place}/{spec.inner}" if spec.inner else spec.place
        raise UserError(
            f"there are no pictures in {where}; name a folder, tar, list or manifest that holds some"
        )
    return table


def _only_split(source: Source, split: str) -> Source:
    wanted = SPLITS.get(split.lower(), split)
    rows = pc.indices_nonzero(pc.equal(source.table["split"].cast(pa.string()), wanted))
    if not len(rows):
        there = ", ".join(sorted(name for name in pc.unique(source.table["split"]).to_pylist() if name))
        raise UserError(f"{source.name} has no split {split!r}; it has {there or 'no splits'}")
    return source.select(rows)


def _check_ids(source: Source) -> None:
    """Ids are what the stages know a picture by; overlapping manifests would break that."""
    numbers = np.concatenate([_as_numbers(chunk) for chunk in source.table["id"].chunks])
    order = np.argsort(numbers, kind="stable")
    double = np.flatnonzero(numbers[order][1:] == numbers[order][:-1])
    if len(double):
        row = int(order[double[0]])
        uri, name = source.table["uri"][row].as_py(), source.table["source"][row].as_py()
        raise UserError(
            f"{len(double):,} pictures are named twice, {uri} of {name} first; name each source once"
        )


def _trimmed(table: pa.Table) -> pa.Table:
    """The table without the texts that only other rows used, where those are many."""
    for place, column in enumerate(table.columns):
        if pa.types.is_dictionary(column.type) and sum(
            len(chunk.dictionary) for chunk in column.chunks
        ) > len(table):
            texts = column.cast(column.type.value_type)
            table = table.set_column(place, table.field(place), texts.dictionary_encode())
    return table


def _as_numbers(ids: pa.Array) -> np.ndarray:
    """Ids of 16 hex digits as 64-bit numbers, without a Python object a row."""
    step = 1 << 20
    texts = ("".join(ids.slice(start, step).to_pylist()) for start in range(0, len(ids), step))
    return np.frombuffer(b"".join(bytes.fromhex(text) for text in texts), dtype=">u8")


def _as_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _from_bytes(name: str, data: bytes, files: OpenFiles) -> Source:
    return Source(name, pa.ipc.open_file(data).read_all(), files)


def _from_file(name: str, path: str, files: OpenFiles) -> Source:
    return Source(name, pa.ipc.open_file(pa.memory_map(path)).read_all(), files)
