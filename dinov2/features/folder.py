"""The embeddings folder: `00000.npy` … fp16 rows, `ids.parquet` (id and uri of each row), and `meta.json`.

`meta.json` is written last: with it the folder is whole. Curation, evaluation and search share the form.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyarrow import parquet

from dinov2.exits import UserError
from dinov2.files import read_json

FORMAT_VERSION = "1.0"
META, IDS = "meta.json", "ids.parquet"


class Embeddings:
    """A finished folder of embeddings. Rows are read from the disk as they are asked for.

    Attributes:
        ids: of the pictures, one a row.
        meta: what `meta.json` says.
    """

    def __init__(self, folder: Path, pieces: Sequence[NDArray[np.float16]], meta: dict[str, Any]) -> None:
        self.folder, self.meta, self._pieces = folder, meta, pieces
        self._ends = np.cumsum([len(piece) for piece in pieces])

    @classmethod
    def open(cls, folder: Path | str) -> "Embeddings":
        """Raises UserError if the folder is missing, unfinished, damaged or of another version."""
        folder = Path(folder)
        if not (folder / META).exists():
            raise UserError(f"{folder} holds no finished embeddings; run the command that makes them again")
        meta = read_json(folder / META)
        version = str(meta.get("format_version"))
        if version.partition(".")[0] != FORMAT_VERSION.partition(".")[0]:
            raise UserError(f"{folder} has format version {version}, this program reads {FORMAT_VERSION}")
        try:
            pieces = [memory_map(path) for path in sorted(folder.glob("[0-9]*.npy"))]
            found = cls(folder, pieces, meta)
            consistent = len(found.ids) == len(found)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} is damaged, remove it and embed again: {error}") from None
        if not consistent:
            raise UserError(f"{folder} is damaged: {len(found):,} rows for {len(found.ids):,} pictures")
        return found

    @cached_property
    def ids(self) -> list[str]:
        return parquet.read_table(self.folder / IDS, columns=["id"])["id"].to_pylist()

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), int(self.meta["dimension"])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, rows: slice | NDArray[np.integer] | Sequence[int]) -> NDArray[np.float16]:
        """These rows, fp16 [rows, dim]: a slice, or indices from 0 in any order. A copy."""
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        rows = np.asarray(rows, dtype=np.int64)
        taken = np.empty((len(rows), self.shape[1]), dtype=np.float16)
        which = np.searchsorted(self._ends, rows, side="right")
        for number in np.unique(which):
            mine = which == number
            piece = self._pieces[number]
            taken[mine] = piece[rows[mine] - (self._ends[number] - len(piece))]
        return taken

    def rows(self, rows: slice) -> NDArray[np.float16]:
        return self[rows]

    def array(self) -> NDArray[np.float16]:
        """All rows: the memory map itself where they are in one file."""
        return self._pieces[0] if len(self._pieces) == 1 else self[:]

    def columns(self, first: str, last: str | None = None) -> slice:
        """Where in a vector these parts lie, from `first` to `last`; see `BackboneEmbedder.parts`."""
        names = [name for name, _ in self.meta["parts"]]
        ends = np.cumsum([width for _, width in self.meta["parts"]])
        start, stop = names.index(first), names.index(last or first)
        return slice(int(ends[start - 1]) if start else 0, int(ends[stop]))


def memory_map(path: Path) -> NDArray[np.float16]:
    """A piece as it lies on the disk. (No rows at all cannot be mapped.)"""
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        shape, _, _ = np.lib.format.read_array_header_1_0(file)
    return np.load(path, mmap_mode="r" if shape[0] else None)
