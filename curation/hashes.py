"""Pairs of 64-bit hashes a few bits apart, all of them, without comparing every pair where there are many.

Multi-index hashing (Norouzi, Punjani and Fleet 2012): of hashes cut into m parts, two that differ in at most
d bits differ in at most d // m of some part. So each part is looked up with up to so many of its bits
flipped, and only what is found is compared whole. For 8 bits that is about 700 look-ups a hash whatever the
number of hashes; as long as comparing all is cheaper, all are compared.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import comb

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Rows = NDArray[np.int64]

AT_ONCE = 4_000_000  # pairs or look-ups at a time
LOOK_UP = 8  # comparisons of one hash with the next that a look-up costs
FOUND = 5  # those that a pair which was looked up costs
WIDEST = 22  # bits of a part: a table of its starts has 2^22 places


class HashTable:
    """Hashes to be searched."""

    def __init__(self, hashes: Hashes, distance: int) -> None:
        """`distance`: bits in which hashes may differ."""
        self._hashes, self._distance = hashes, distance
        self._parts = [
            _Part.of(hashes, *span, distance // len(spans))
            for spans in [_spans(len(hashes), distance)]
            for span in spans
        ]

    def near(self, queries: Hashes) -> Iterator[tuple[Rows, Rows]]:
        """Rows of the queries and of the table that are near each other; each pair once, in no set order."""
        tall = max(1, AT_ONCE // max(1, len(self._hashes))) if not self._parts else AT_ONCE // 16
        for at in range(0, len(queries), tall):
            some = queries[at : at + tall]
            if not self._parts:
                a, b = np.nonzero(np.bitwise_count(some[:, None] ^ self._hashes[None, :]) <= self._distance)
                yield a + at, b
            for number in range(len(self._parts)):
                for a, b in self._by_part(some, number):
                    yield a + at, b

    def _by_part(self, queries: Hashes, number: int) -> Iterator[tuple[Rows, Rows]]:
        part = self._parts[number]
        for a, b in part.alike(queries):
            apart = queries[a] ^ self._hashes[b]
            near = np.bitwise_count(apart) <= self._distance
            a, b, apart = a[near], b[near], apart[near]
            for earlier in self._parts[:number]:  # has found some of these already
                new = np.bitwise_count(apart & earlier.mask) > earlier.radius
                a, b, apart = a[new], b[new], apart[new]
            yield a, b


@dataclass(frozen=True)
class _Part:
    """The table's rows ordered by some of the hashes' bits."""

    first: np.uint64
    mask: np.uint64
    radius: int
    flips: NDArray[np.uint64]  # each at most `radius` of the part's bits
    order: Rows
    starts: Rows  # where in `order` each value of the bits begins

    @classmethod
    def of(cls, hashes: Hashes, first: int, width: int, radius: int) -> "_Part":
        ones = (1 << width) - 1
        key = (hashes >> np.uint64(first)) & np.uint64(ones)
        starts = np.concatenate([[0], np.cumsum(np.bincount(key.astype(np.int64), minlength=ones + 1))])
        flips = [
            sum(1 << bit for bit in bits)
            for count in range(radius + 1)
            for bits in combinations(range(width), count)
        ]
        return cls(
            np.uint64(first),
            np.uint64(ones << first),
            radius,
            np.array(flips, np.uint64),
            np.argsort(key, kind="stable"),
            starts,
        )

    def alike(self, queries: Hashes) -> Iterator[tuple[Rows, Rows]]:
        """Rows of queries and table that differ in at most `radius` bits of this part."""
        key = (queries & self.mask) >> self.first
        for flip in self.flips:
            place = (key ^ flip).astype(np.int64)
            start = self.starts[place]
            count = self.starts[place + 1] - start
            some = np.flatnonzero(count)
            for rows in _together(some, count[some]):
                many = count[rows]
                step = np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many)
                yield np.repeat(rows, many), self.order[np.repeat(start[rows], many) + step]


def _together(rows: Rows, counts: Rows) -> Iterator[Rows]:
    """Runs of rows whose counts add up to about AT_ONCE."""
    which = np.cumsum(counts) // AT_ONCE
    return iter(np.split(rows, np.flatnonzero(np.diff(which)) + 1)) if len(rows) else iter(())


def _spans(count: int, distance: int) -> list[tuple[int, int]]:
    """First bit and width of each part, for the least work; none where comparing all is less."""
    best, spans = float(count), []
    for parts in range(-(-64 // WIDEST), 9):
        width, radius = 64 // parts, distance // parts
        looked_up = parts * sum(comb(width, flipped) for flipped in range(radius + 1))
        work = looked_up * (LOOK_UP + FOUND * count / 2**width)
        if work < best:
            edges = [round(64 * part / parts) for part in range(parts + 1)]
            best, spans = work, [(low, high - low) for low, high in pairwise(edges)]
    return spans
