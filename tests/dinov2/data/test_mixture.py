"""Mixtures: proportions that hold exactly, epochs of each source, and nothing to remember."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dinov2.config import read
from dinov2.data.mixture import Mixture, Turns
from dinov2.exits import UserError
from dinov2.train.config import TrainConfig
from dinov2.train.feed import training_order, training_source
from tests.dinov2.data.cost import cost
from tests.pictures import class_folder

COUNTS = [700, 40, 3000]
BATCH = 20


def _mixture(**over: object) -> Mixture:
    settings = {"weights": [3.0, 1.0, 6.0], "pure": [0.0, 0.1, 0.0], "batch": BATCH} | over
    return Mixture(COUNTS, 5, **settings)  # pyright: ignore[reportArgumentType]


def _sources(rows: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum(COUNTS), rows, side="right")


@pytest.mark.parametrize(
    "shares",
    [
        [0.5, 0.5],
        [0.1, 0.9],
        [1 / 3, 1 / 3, 1 / 3],
        [0.123, 0.877],
        [2**-0.5, 1 - 2**-0.5],
        [1.0],
        [0.0, 1.0],
    ],
)
def test_turns_keep_the_shares_in_every_period_and_number_each_parts_places_without_gaps(shares: list[float]):
    turns = Turns(shares, seed=1, least=30)
    assert 30 <= turns.period <= 10_000
    periods = 3
    taken = [turns.turn(place) for place in range(periods * turns.period)]
    for part, share in enumerate(shares):
        numbers = [number for which, number in taken if which == part]
        assert sorted(numbers) == list(range(len(numbers)))
        for period in range(periods):
            inside = taken[period * turns.period : (period + 1) * turns.period]
            assert sum(which == part for which, _ in inside) == pytest.approx(share * turns.period, abs=1)
    if len(shares) > 1 and 0 not in shares:
        assert taken[: turns.period] != [
            (part, number) for part, number in taken[turns.period : 2 * turns.period]
        ]


def test_one_batch_in_ten_is_of_one_source_and_the_others_are_mixed_by_weight():
    order = _mixture()
    rows = np.array([[order.sample(step * BATCH + place) for place in range(BATCH)] for step in range(600)])
    sources = _sources(rows)
    pure = (sources == 1).all(axis=1)
    assert [int(pure[start : start + 10].sum()) for start in range(0, 600, 10)] == [1] * 60
    assert np.unique(np.flatnonzero(pure) % 10).size > 5  # not every tenth
    shares = np.bincount(sources[~pure].ravel(), minlength=3) / sources[~pure].size
    assert shares == pytest.approx([0.3, 0.1, 0.6], abs=0.01)


def test_each_source_goes_through_whole_epochs():
    order = _mixture()
    rows = [order.sample(position) for position in range(600 * BATCH)]
    batches = np.array(rows).reshape(-1, BATCH)
    pure = (_sources(batches) == 1).all(axis=1)
    alone, together = batches[pure].ravel(), batches[~pure].ravel()
    assert set(Counter(alone.tolist()).values()) == {30}  # 60 batches of 20 over 40 pictures
    seen = Counter(together[_sources(together) == 0].tolist())
    assert set(seen.values()) <= {4, 5} and len(seen) == 700  # 3240 of 700, the last epoch begun


def test_any_access_gives_what_going_through_gives_and_replacements_stay_in_the_source():
    order = _mixture(window=4, block=10)
    through = [order.sample(position) for position in range(6000)]
    copy = pickle.loads(pickle.dumps(order))
    assert len(pickle.dumps(copy)) < 5000
    for position in np.random.default_rng(0).permutation(6000)[:1500].tolist():
        assert copy.sample(position) == through[position]
        other = copy.replacement(position, 0)
        assert other != through[position]
        assert len(set(_sources(np.array([other, through[position]])).tolist())) == 1


def test_a_sample_of_a_mixture_costs_as_little_as_one_of_a_source():
    order = Mixture([10**6, 10**5], 1, weights=[0.7, 0.3], pure=[0.0, 0.1], batch=64, window=16)
    assert cost(order, range(20_000)) < 60


def test_names_and_weights_come_from_the_settings(tmp_path: Path):
    class_folder(tmp_path / "a", classes=2, each=8, size=(20, 16))
    class_folder(tmp_path / "b", classes=2, each=4, size=(20, 16))
    words = [f"data=web={tmp_path / 'a'},seeds={tmp_path / 'b'}", "output=x", "steps=1", "batch=8"]

    def rows(*more: str) -> list[int]:
        config = read(TrainConfig, [*words, *more])
        order = training_order(config, training_source(config))
        return [order.sample(position) for position in range(256)]

    assert sum(row < 16 for row in rows("mix.web=3", "mix.seeds=1")) == 192
    batches = np.array(rows("pure.seeds=0.25")).reshape(-1, 8)
    assert sum((batch >= 16).all() for batch in batches) >= 8
    for more, message in (
        (["mix.wbe=1"], "mix.wbe: data= names no such source; it names web, seeds"),
        (["pure.web=0.7", "pure.seeds=0.7"], "cannot be more than 1"),
        (["mix.web=0"], "no source a weight above 0"),
        (["pure.seeds=0.1", "batch=16"], "cannot fill a batch of 16"),
        (["mix.web=-1"], "should be 0 or at least"),
    ):
        with pytest.raises(UserError, match=message):
            rows(*more)
