"""The order of data as a function of the position in training: O(1) time and memory, and nothing to save.

Position p of training is picture `order.sample(p)`, whatever the number of ranks and workers and wherever a
run was resumed, so that a checkpoint stores one integer and no sampler has any state.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from hashlib import blake2b, shake_128
from math import isqrt
from typing import Protocol

LARGEST = 2**48
SMALL = 24
_MASK = 2**64 - 1


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on their order, the same on every machine.

    Each part is hashed with its type and length, so that (1, 23) and (12, 3), or 1 and "1", differ.
    """
    text = "".join(f"{type(part).__name__}{len(str(part))}:{part}" for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class SampleOrder(Protocol):
    """What the loader asks of an order; a mixture of several sources is another class with these two."""

    def sample(self, position: int) -> int:
        """The row of the source at this position of training."""
        ...

    def replacement(self, position: int, attempt: int) -> int:
        """The row to try instead where reading `sample(position)` failed; attempts count from 0."""
        ...


class Permutation:
    """A keyed permutation of range(n), 1 <= n <= 2**48, evaluated one index at a time.

    A Feistel network over pairs (left, right) of Z_a x Z_b with a*b barely above n, eight rounds; what falls
    outside of range(n) is sent through again (cycle walking), which is rare since a*b - n < a = O(sqrt n).
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002.) For shuffling, not for secrecy.
    Up to 24 items, where such a network favours some permutations, a table is shuffled instead.

    Args:
        tweak: 64 random bits, another permutation for each; cheaper than another key, which is hashed.
    """

    __slots__ = ("_a", "_b", "_keys", "_table", "n")

    def __init__(self, n: int, key: int, tweak: int = 0) -> None:
        if not 1 <= n <= LARGEST:
            raise ValueError(f"a permutation of {n} items: 1 to 2**48 are possible")
        self.n = n
        self._table = None
        if n <= SMALL:
            drawn = shake_128(_as_bytes(key) + _as_bytes(tweak)).digest(8 * n)
            self._table = sorted(range(n), key=struct.unpack(f"<{n}Q", drawn).__getitem__)
            return
        self._a = isqrt(n - 1) + 1
        self._b = -(-n // self._a)
        self._keys = _round_keys(key)
        if tweak:
            other = tweak * 0xD1342543DE82EF95 & _MASK
            self._keys = [(left ^ tweak, right ^ other) for left, right in self._keys]

    def __call__(self, index: int) -> int:
        """Where `index` goes; IndexError outside of range(n)."""
        if not 0 <= index < self.n:
            raise IndexError(f"{index} is not in range({self.n})")
        if self._table is not None:
            return self._table[index]
        a, b = self._a, self._b
        while True:
            left, right = divmod(index, b)
            for key_left, key_right in self._keys:  # written out twice: a call would double the time
                mixed = (right ^ key_left) * 0x9E3779B97F4A7C15 & _MASK
                left = (left + (mixed ^ mixed >> 32)) % a
                mixed = (left ^ key_right) * 0x9E3779B97F4A7C15 & _MASK
                right = (right + (mixed ^ mixed >> 32)) % b
            index = left * b + right
            if index < self.n:
                return index


@lru_cache(maxsize=64)
def _round_keys(key: int) -> list[tuple[int, int]]:
    words = struct.unpack("<8Q", blake2b(_as_bytes(key)).digest())
    return list(zip(words[::2], words[1::2], strict=True))


def _as_bytes(key: int) -> bytes:
    return key.to_bytes(16, "little", signed=True)


def mixed(number: int) -> int:
    """64 bits that each depend on all of the number's (Steele et al., SplitMix, 2014)."""
    number = number * 0x9E3779B97F4A7C15 & _MASK
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    number = (number ^ number >> 27) * 0x94D049BB133111EB & _MASK
    return number ^ number >> 31


class Order:
    """Every epoch an exact permutation of `count` rows, a different one each time.

    With a `window`, reads stay near each other: storage order is cut into blocks of `block` rows (about
    those of a shard), the blocks are permuted, and rows are permuted within runs of `window` blocks, so that
    at most window + 2 blocks are in use at any time. The ragged last block takes a random place among the
    others, and the bounds of the runs move from epoch to epoch.
    """

    def __init__(self, count: int, seed: int, window: int | None = None, block: int = 1000) -> None:
        if count < 1 or block < 1 or (window is not None and window < 1):
            raise ValueError(f"an order of {count} rows in windows of {window} blocks of {block}: 1 at least")
        self.count = count
        self.seed = seed
        self.block = block
        self.run = None if window is None or window * block >= count else window * block
        self.key = derive_seed("order", seed)
        self._epoch: tuple[int, _Epoch] | None = None  # the one in use; another is made in microseconds

    def epoch(self, position: int) -> int:
        """How many times every row has been seen before this position."""
        return position // self.count

    def sample(self, position: int) -> int:
        """The row at this position, which may be any number from 0 on."""
        number, place = divmod(position, self.count)
        if self._epoch is None or self._epoch[0] != number:
            if number < 0:
                raise IndexError(f"position {position} is before the start")
            self._epoch = number, _Epoch(self, number)
        return self._epoch[1].row(place)

    def replacement(self, position: int, attempt: int) -> int:
        """A row other than `sample(position)`; attempts 0 to count - 2 go through all others."""
        failed = self.sample(position)
        if self.count == 1:
            return failed
        others = Permutation(self.count - 1, derive_seed("replacement", self.seed, position))
        other = others(attempt % others.n)
        return other + (other >= failed)


class _Epoch:
    """The permutations of one epoch, and the run of blocks that was used last."""

    def __init__(self, order: Order, number: int) -> None:
        self.count, self.block, self.run, self.key = order.count, order.block, order.run, order.key
        self.tweak = mixed(order.key ^ number)
        if self.run is None:
            self.inside = Permutation(self.count, self.key, self.tweak)
            return
        full, self.tail = divmod(self.count, self.block)
        self.blocks = Permutation(full, self.key, self.tweak)
        self.tail_at = (self.tweak * (full + 1) >> 64) * self.block
        self.shift = ((self.tweak & 0xFFFFFFFF) * (self.run // self.block) >> 32) * self.block
        self.begin = self.end = 0

    def row(self, place: int) -> int:
        if self.run is None:
            return self.inside(place)
        if not self.begin <= place < self.end:
            self._enter(place, self.run)
        return self._stored(self.begin + self.inside(place - self.begin))

    def _enter(self, place: int, run: int) -> None:
        """Makes the run that holds `place` the current one; the first and last of an epoch are shorter."""
        number = (place + self.shift) // run
        self.begin = max(0, number * run - self.shift)
        self.end = min(self.count, (number + 1) * run - self.shift)
        tweak = self.tweak ^ (number + 1) * 0x9E3779B97F4A7C15 & _MASK
        self.inside = Permutation(self.end - self.begin, self.key, tweak)

    def _stored(self, place: int) -> int:
        """The row at `place` of the blocks laid out in their permuted order, the ragged one at `tail_at`."""
        if place >= self.tail_at:
            if place < self.tail_at + self.tail:
                return self.count - self.tail + place - self.tail_at
            place -= self.tail
        slot, inside = divmod(place, self.block)
        return self.blocks(slot) * self.block + inside
