"""Connected components of more edges than memory holds: a union-find that takes a chunk of edges at once.

A forest in one array, 4 bytes a node: 200 million nodes in 0.8 GB. For each chunk of edges the roots of both
ends are looked up together, the higher root is hung under the lower one, and what that did not join comes
again (hooking and pointer jumping: Shiloach and Vishkin 1982). A few rounds settle a chunk. The lowest node
of a component is always its root, so the result depends neither on the order of the edges nor on the chunks.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import parquet

CHUNK = 1 << 20  # edges or nodes at a time; larger chunks gain nothing

Nodes = NDArray[np.integer[Any]]


class Components:
    """Components of `count` nodes, as far as they have been joined."""

    def __init__(self, count: int) -> None:
        self._parent = np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)

    def join(self, a: Nodes, b: Nodes) -> None:
        """Join the two ends of each edge."""
        for at in range(0, len(a), CHUNK):
            self._join(a[at : at + CHUNK], b[at : at + CHUNK])

    def labels(self) -> Nodes:
        """[count] the lowest node of each node's component. Not a copy: not to be written to."""
        parent = self._parent
        for at in range(0, len(parent), CHUNK):
            # Parents are lower, so those of earlier chunks are roots already.
            mine = parent[at : at + CHUNK]
            while not np.array_equal(higher := parent.take(mine), mine):
                mine[:] = higher
        return parent

    def _join(self, a: Nodes, b: Nodes) -> None:
        parent = self._parent
        ends, roots = (a, b), (self._roots(a), self._roots(b))
        for end, root in zip(ends, roots, strict=True):
            parent[end] = root  # shorter ways for edges to come
        first = True
        while True:
            high, low = np.maximum(*roots), np.minimum(*roots)
            apart = high != low
            high, low = high[apart], low[apart]
            if not len(high):
                return
            if first:  # most roots are wanted by one edge only
                parent[high] = low
            else:  # the lowest wins, or a hub would be joined to one neighbour a round
                np.minimum.at(parent, high, low)
            first = False
            self._shorten(high)
            left = parent.take(high) != self._roots(low)
            roots = self._roots(high[left]), self._roots(low[left])

    def _roots(self, nodes: Nodes) -> Nodes:
        root = self._parent.take(nodes)
        higher = self._parent.take(root)
        moving = np.flatnonzero(higher != root)
        while len(moving):
            root[moving] = higher[moving]
            higher[moving] = self._parent.take(root[moving])
            moving = moving[higher[moving] != root[moving]]
        return root

    def _shorten(self, hung: Nodes) -> None:
        """Point nodes that were roots at their new root: a chain of a whole chunk halves at every turn."""
        while len(hung):
            above = self._parent.take(hung)
            higher = self._parent.take(above)
            moving = higher != above
            hung = hung[moving]
            self._parent[hung] = higher[moving]


def components(count: int, edges: Iterable[Path], *, least: float | None = None) -> Nodes:
    """[count] the lowest row of each row's component, from Parquet files of edges.

    Args:
        edges: files with integer columns a and b, rows in [0, count), in any order.
        least: only edges of at least this similarity count; needs a column of that name.

    Raises:
        ValueError: an edge leads to a row that is not there.
    """
    found = Components(count)
    for path in edges:
        for a, b in edge_chunks(path, least=least):
            if len(a) and (min(a.min(), b.min()) < 0 or max(a.max(), b.max()) >= count):
                raise ValueError(f"{path} holds an edge to a row outside of 0 to {count - 1}")
            found.join(a, b)
    return found.labels()


def edge_chunks(path: Path, *, least: float | None = None) -> Iterator[tuple[Nodes, Nodes]]:
    """The columns a and b of a Parquet file of edges, CHUNK rows at a time."""
    columns = ["a", "b"] if least is None else ["a", "b", "similarity"]
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(CHUNK, columns=columns):
            if least is not None:
                # compared as the float32 that is stored: the double 0.6 is less than the float 0.6
                batch = batch.filter(pc.greater_equal(batch["similarity"], pa.scalar(least, pa.float32())))
            yield batch["a"].to_numpy(), batch["b"].to_numpy()
