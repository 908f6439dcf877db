"""What a position of an order costs, in a unit that another machine shares."""

import time
from collections.abc import Sequence
from hashlib import blake2b

from dinov2.data.order import SampleOrder

PIECE = 200


def cost(order: SampleOrder, positions: Sequence[int]) -> float:
    """Of a sample, in hashes of one byte; the least of many pieces, for the machine may be busy.

    A hash takes a quarter of a microsecond on a fast core, where 40 of them are the 10 microseconds that
    an index may cost; `make bench` has it in microseconds.
    """
    samples, hashes = [], []
    for start in range(0, len(positions), PIECE):
        piece = positions[start : start + PIECE]
        began = time.perf_counter()
        for position in piece:
            order.sample(position)
        between = time.perf_counter()
        for _ in piece:
            blake2b(b"x").digest()
        samples.append(between - began)
        hashes.append(time.perf_counter() - between)
    return min(samples) / min(hashes)
