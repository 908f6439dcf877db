"""The best columns of each query among all that tiles of similarities offer."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dinov2.neighbours import keys

BLOCK = 64  # similarities whose maximum is looked at before each is


@dataclass(frozen=True)
class Wanted:
    """What a list has to hold: values of at least `least`, and the first `always`, but for rounding."""

    always: int
    least: float
    rounding: float = 0.0

    @property
    def last(self) -> int:
        """The place of the last that is always wanted."""
        return max(0, self.always - 1)

    def cut(self, last: Float[Tensor, "queries"]) -> Float[Tensor, "queries"]:
        """Under which nothing is wanted, where at least this value is at the place `last`."""
        if not self.always:
            return torch.full_like(last, self.least)
        return (last - self.rounding).clamp(max=self.least)


class ShortList:
    """For each query the `size` best columns offered so far that are wanted, the best first, as `keys`."""

    def __init__(self, key: Int[Tensor, "queries size"], wanted: Wanted) -> None:
        self.key, self.size, self.wanted = key, key.shape[1], wanted

    @classmethod
    def empty(cls, queries: int, size: int, device: torch.device, wanted: Wanted) -> "ShortList":
        return cls(_empty(queries, size, device), wanted)

    @property
    def value(self) -> Float[Tensor, "queries size"]:
        return keys.value_of(self.key)

    @property
    def column(self) -> Int[Tensor, "queries size"]:
        return keys.column_of(self.key)

    def part(self, queries: slice) -> "ShortList":
        """The lists of these queries: what is offered to the part is in the whole."""
        return ShortList(self.key[queries], self.wanted)

    def offer(self, similarity: Float[Tensor, "queries columns"], first: int) -> None:
        """Offer a whole tile whose first column is `first` of the base.

        A full top-k over every tile would cost as much as the products. Few columns beat what is already
        there, so the maximum of each block is compared first, and only blocks that may matter are opened.
        """
        last, always = keys.value_of(self.key[:, self.wanted.last]), self.wanted.last + 1
        threshold = keys.value_of(self.key[:, -1]).maximum(self.wanted.cut(last))
        width, unfilled = similarity.shape[1], bool(torch.isneginf(threshold).any())
        # A power of two divides most tiles, which then need not be copied to be padded. While lists are not
        # full there have to be more blocks than places.
        block = BLOCK if 4 * BLOCK * self.size < first else BLOCK // 2
        if unfilled:
            block = min(block, 1 << max(0, (width // (2 * always)).bit_length() - 1))
        if width % block:
            similarity = torch.nn.functional.pad(similarity, (0, block - width % block), value=-torch.inf)
        blocks = similarity.view(len(similarity), -1, block)
        highest = blocks.amax(2)
        if unfilled and highest.shape[1] >= always:
            # As many blocks as are wanted reach this value, so what is below it can not stay.
            least = self.wanted.cut(highest.topk(always, dim=1).values[:, -1])
            threshold = threshold.maximum(least.nextafter(least.new_tensor(-torch.inf)))
        which = (highest > threshold[:, None]).flatten().nonzero()[:, 0]
        row = which // highest.shape[1]
        opened = blocks.flatten(0, 1).index_select(0, which)
        place = (opened > threshold[row, None]).flatten().nonzero()[:, 0]
        inner = place // block
        row = row[inner]
        column = which[inner] * block + place % block - row * similarity.shape[1] + first
        self._insert(row, column, opened.flatten()[place])

    def merge(self, rows: Tensor, column: Tensor, value: Tensor) -> None:
        """Offer lists of columns for some rows: column and value [len(rows), any]."""
        self._merge(rows, keys.pack(value, column))

    def _merge(self, rows: Tensor, key: Tensor) -> None:
        self.key[rows] = keys.sort(torch.cat([self.key[rows], key], dim=1))[:, : self.size]

    def _insert(self, row: Tensor, column: Tensor, value: Tensor) -> None:
        """Offer single columns, in ascending order of their rows."""
        key = keys.pack(value, column)
        counts = torch.bincount(row, minlength=len(self.value))
        slot = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        few = counts <= self.size
        # Apart, because a list is as wide as its longest: neighbours of one class often lie together.
        for group in (few & (counts > 0), ~few):
            rows = group.nonzero()[:, 0]
            if len(rows) == 0:
                continue
            mine = group[row]
            place = (group.cumsum(0) - 1)[row[mine]], slot[mine]
            width = int(counts[rows].max())
            listed = _empty(len(rows), width, row.device)
            listed[place] = key[mine]
            self._merge(rows, listed)


def _empty(queries: int, places: int, device: torch.device) -> Int[Tensor, "queries places"]:
    """Keys that any column is better than."""
    nothing = keys.pack(torch.tensor(-torch.inf), torch.tensor(keys.NONE))
    return torch.full((queries, places), int(nothing), dtype=torch.int64, device=device)
