"""Folder trees of pictures: the walk, and what the folders' names say."""

import os
from collections.abc import Collection, Iterator
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from dinov2.data.decode import picture_extensions
from dinov2.data.specs import SPLITS
from dinov2.data.tars import printable
from dinov2.exits import UserError

CHUNK = 1 << 20  # rows gathered as Python objects before they become Arrow columns
FIRST_TWO = r"^(?P<first>[^/]+)/(?:(?P<second>[^/]+)/)?"


class Found(NamedTuple):
    """Pictures under a folder, sorted by path: uri is relative to the folder, size in bytes."""

    uri: pa.ChunkedArray
    size: pa.ChunkedArray


def walk(root: str, extensions: Collection[str] | None = None) -> Found:
    """Find the files with these extensions under `root`, by default those of pictures.

    Symbolic links are followed, hidden names are not.

    Raises:
        UserError: a folder cannot be listed.
    """
    uris, sizes, names, lengths = [], [], [], []
    for name, length in _files(root, extensions or picture_extensions()):
        names.append(name)
        lengths.append(length)
        if len(names) == CHUNK:
            uris.append(pa.array(names, pa.large_string()))
            sizes.append(pa.array(lengths, pa.int64()))
            names, lengths = [], []
    uris.append(pa.array(names, pa.large_string()))
    sizes.append(pa.array(lengths, pa.int64()))
    table = pa.table({"uri": pa.chunked_array(uris), "size": pa.chunked_array(sizes)}).sort_by("uri")
    return Found(table["uri"], table["size"])


def layout(paths: pa.ChunkedArray, root_split: str | None = None) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Split and label of each picture by the folders it lies in.

    The label is the first folder. Where all first folders are train, val or test, they are the split, and the
    label is the folder below. `root_split` is the split where the root itself is such a folder.
    """
    parts = pc.extract_regex(paths, FIRST_TWO)
    first = pc.struct_field(parts, "first")
    tops = [top for top in pc.unique(first).to_pylist() if top]
    nothing = pa.chunked_array([pa.nulls(len(paths), pa.string())])
    if not tops or not all(top.lower() in SPLITS for top in tops):
        whole = pa.repeat(pa.scalar(root_split, pa.string()), len(paths))
        return pa.chunked_array([whole]), first if tops else nothing
    second = pc.struct_field(parts, "second")
    return known_splits(first), pc.if_else(pc.equal(second, ""), None, second)


def known_splits(words: pa.ChunkedArray) -> pa.ChunkedArray:
    """Split names brought to train, val and test; other names stay as they are."""
    coded = pc.dictionary_encode(words).combine_chunks()
    names = [SPLITS.get(word.lower(), word) if word else None for word in coded.dictionary.to_pylist()]
    return pa.chunked_array([pa.array(names, pa.string()).take(coded.indices)])


def _files(root: str, extensions: Collection[str]) -> Iterator[tuple[str, int | None]]:
    found = os.stat(root)
    pending = [("", frozenset({(found.st_dev, found.st_ino)}))]
    while pending:
        folder, above = pending.pop()
        try:
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    name = entry.name
                    if name[0] == ".":
                        continue
                    if entry.is_dir():
                        inside = entry.stat()
                        identity = (inside.st_dev, inside.st_ino)
                        if identity not in above:  # else a link back to a folder that it lies in
                            pending.append((f"{folder}{name}/", above | {identity}))
                    elif name.rpartition(".")[2].lower() in extensions:
                        yield printable(folder + name), _size(entry)
        except OSError as error:
            raise UserError(f"{os.path.join(root, folder)} cannot be listed: {error.strerror}") from None


def _size(entry: "os.DirEntry[str]") -> int | None:
    try:
        return entry.stat().st_size
    except OSError:  # a dangling link: reading it will say so
        return None
