"""Hashes looked up by parts give the pairs that comparing all gives."""

import numpy as np
import pytest

from curation import hashes as module
from curation.hashes import HashTable


def clumped(count: int, seed: int) -> np.ndarray:
    """Hashes of which many lie within a few bits of others, as those of pictures do."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(9).integers(2**64, size=count // 8, dtype=np.uint64)
    flips = np.zeros(count, np.uint64)
    for _ in range(7):
        bit = np.uint64(1) << generator.integers(64, size=count, dtype=np.uint64)
        flips ^= np.where(generator.random(count) < 0.3, bit, np.uint64(0))
    return centres[generator.integers(len(centres), size=count)] ^ flips


@pytest.mark.parametrize("distance", [0, 3, 8, 11])
@pytest.mark.parametrize("at_once", [1000, 4_000_000])
def test_all_pairs_are_found_once(distance, at_once, monkeypatch):
    base, queries = clumped(2000, 0), clumped(500, 1)
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    monkeypatch.setattr(module, "LOOK_UP", 0)  # as if there were many
    monkeypatch.setattr(module, "FOUND", 0)
    table = HashTable(base, distance)
    assert len(module._spans(2000, distance)) > 1
    found = np.concatenate([np.stack(pair, axis=1) for pair in table.near(queries)])
    expected = np.argwhere(np.bitwise_count(queries[:, None] ^ base[None]) <= distance)
    assert len(expected) > 20
    assert np.array_equal(found[np.lexsort(found.T[::-1])], expected)


def test_few_are_compared_one_with_another_and_many_are_looked_up():
    assert module._spans(200, 8) == []
    assert module._spans(1_000_000, 8) == [(0, 21), (21, 22), (43, 21)]
    base = clumped(300, 2)
    found = np.concatenate([np.stack(pair, axis=1) for pair in HashTable(base, 8).near(base)])
    assert len(found) == (np.bitwise_count(base[:, None] ^ base[None]) <= 8).sum()
    assert list(HashTable(base[:0], 8).near(base[:0])) == []
