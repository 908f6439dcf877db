"""Several sources in fixed proportions, as a function of the position in training.

Within a batch, pictures come from the sources by weight; and a share of the batches can be of one source
alone (DINOv3, arXiv 2508.10104, sec. 3.1: one batch in ten is of ImageNet only). Like the order of one source
it has no state: a run that continues, on any number of ranks, meets what it would have met.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from math import lcm

from dinov2.data.order import Order, Permutation, derive_seed, mixed
from dinov2.exits import UserError

LONGEST = 10_000  # places of a period: shares hold to 0.01%
AT_LEAST = 256  # pictures of a period, so that a new one begins seldom


class Turns:
    """Whose turn it is at each place, in exact proportion within every period, and in random order there."""

    def __init__(self, shares: Sequence[float], seed: int, least: int = 1) -> None:
        """Args:
        shares: of each part, summing to one. The period is the shortest of at least `least` places in which
            all of them are whole numbers; of 10,000 places where none is that short.
        """
        exact = [Fraction(share).limit_denominator(1000) for share in shares]  # 0.1 is meant as a tenth
        period = lcm(*(share.denominator for share in exact))
        if sum(exact) != 1 or period > LONGEST:
            whole = sum(map(Fraction, shares))
            exact, period = [Fraction(share) / whole for share in shares], LONGEST
        self.period = period * -(-least // period)
        self.counts = _rounded([share * self.period for share in exact], self.period)
        self.ends = list(accumulate(self.counts))
        self.key = derive_seed("turns", seed)
        self._slots: tuple[int, Permutation] | None = None  # of the period in use

    def turn(self, place: int) -> tuple[int, int]:
        """The part whose turn it is at this place, and a number that no other place gives that part.

        Over any whole number of periods these numbers are 0, 1, 2, … for each part, in random order within
        a period.
        """
        number, inside = divmod(place, self.period)
        if self._slots is None or self._slots[0] != number:
            self._slots = number, Permutation(self.period, self.key, mixed(self.key ^ number))
        slot = self._slots[1](inside)
        part = bisect_right(self.ends, slot)
        return part, self.counts[part] * (number + 1) - self.ends[part] + slot


class Mixture:
    """An order of pictures over several sources whose rows lie one source after the other.

    Each source goes through epochs of its own, every one an exact permutation; so do its pure batches.
    """

    def __init__(
        self,
        counts: Sequence[int],
        seed: int,
        *,
        weights: Sequence[float] | None,
        pure: Sequence[float],
        batch: int,
        window: int | None = None,
        block: int = 1000,
    ) -> None:
        """Args:
        counts: rows of each source.
        weights: of each source among the pictures of mixed batches; None to mix as if all were one source.
        pure: share of the batches that are of each source alone.
        batch: pictures of a batch, over all ranks.
        """
        self.batch = batch
        self.firsts = [end - count for end, count in zip(accumulate(counts), counts, strict=True)]
        self.steps = Turns([*pure, max(0.0, 1 - sum(pure))], derive_seed("pure", seed))
        self.alone = _orders(counts, derive_seed("alone", seed), window, block)
        if weights is None:
            self.turns, self.orders = None, [Order(sum(counts), seed, window, block)]
        else:
            shares = [weight / sum(weights) for weight in weights]
            self.turns = Turns(shares, derive_seed("mix", seed), AT_LEAST)
            self.orders = _orders(counts, derive_seed("mix", seed), window, block)
        self._step: tuple[int, tuple[int, int]] = -1, (0, 0)

    def sample(self, position: int) -> int:
        first, order, index = self._where(position)
        return first + order.sample(index)

    def replacement(self, position: int, attempt: int) -> int:
        """A row of the same source as the one at this position."""
        first, order, index = self._where(position)
        return first + order.replacement(index, attempt)

    def _where(self, position: int) -> tuple[int, Order, int]:
        """First row of the source, its order, and the position in that."""
        step, place = divmod(position, self.batch)
        if self._step[0] != step:
            self._step = step, self.steps.turn(step)
        part, number = self._step[1]
        index = number * self.batch + place
        if part < len(self.alone):
            return self.firsts[part], self.alone[part], index
        if self.turns is None:
            return 0, self.orders[0], index
        part, index = self.turns.turn(index)
        return self.firsts[part], self.orders[part], index


def shares_by_name(given: Mapping[str, float], names: Sequence[str], key: str) -> list[float]:
    """The numbers in the order of the sources' names; 0 for a source that is not mentioned.

    Raises:
        UserError: there is no such source, or a number is negative, or too small to be met.
    """
    for name, share in given.items():
        if name not in names:
            raise UserError(f"{key}.{name}: data= names no such source; it names {', '.join(names)}")
        if share < 0 or 0 < share < sum(given.values()) / LONGEST:
            raise UserError(f"{key}.{name}={share:g} should be 0 or at least 1 in {LONGEST:,} of the whole")
    return [float(given.get(name, 0.0)) for name in names]


def _orders(counts: Sequence[int], seed: int, window: int | None, block: int) -> list[Order]:
    return [Order(count, derive_seed(seed, place), window, block) for place, count in enumerate(counts)]


def _rounded(shares: Sequence[Fraction], total: int) -> list[int]:
    """Whole numbers that sum to `total`; the largest remainders are rounded up."""
    whole = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda place: whole[place] - shares[place])
    for place in by_remainder[: total - sum(whole)]:
        whole[place] += 1
    return whole
