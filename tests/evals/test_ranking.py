"""Figures of rankings equal independent implementations, on random scores and on degenerate ones."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, precision_recall_curve
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMAP

from evals.ranking import micro_average_precision, ranked, recall_at_precision, revisited


def by_walking(order, positive, junk):
    """The revisited protocol, walked through: the area under precision over recall, junk passed over."""
    found, seen, area, precision = 0, 0, 0.0, 1.0
    for row in order:
        if row in junk:
            continue
        seen += 1
        found += row in positive
        now = found / seen
        if row in positive:
            area += (precision + now) / 2 / len(positive)
        precision = now
    return area


def precision_of_first(order, positive, junk, k):
    kept = [row for row in order if row not in junk]
    last = max(place for place, row in enumerate(kept) if row in positive) + 1
    first = kept[: min(k, last)]
    return sum(row in positive for row in first) / len(first)


def test_the_revisited_figures_are_those_of_walking_down_the_ranking():
    random = np.random.default_rng(0)
    for _ in range(300):
        order = random.permutation(size := int(random.integers(1, 40)))
        kinds = random.choice(3, size, p=[0.4, 0.3, 0.3])
        positive, junk = set(np.flatnonzero(kinds == 1)), set(np.flatnonzero(kinds == 2))
        rank = np.empty(size, dtype=np.int64)
        rank[order] = np.arange(size)
        precision, at = revisited(rank[sorted(positive)], rank[sorted(junk)], (1, 5, 50))
        if not positive:
            assert np.isnan(precision) and np.isnan(at[1])
            continue
        assert precision == pytest.approx(by_walking(order, positive, junk), abs=1e-12)
        for k, found in at.items():
            assert found == pytest.approx(precision_of_first(order, positive, junk, k), abs=1e-12)
    first = np.array([0, 1, 2])
    assert revisited(first, np.array([], dtype=np.int64), (1,)) == (1.0, {1: 1.0})
    assert revisited(first + 2, np.array([0, 1]), (5,)) == (1.0, {5: 1.0})


@pytest.mark.parametrize("values", [1000, 4, 1])
def test_average_precision_is_scikit_learns_with_equal_scores_too(values):
    random = np.random.default_rng(values)
    scores = torch.from_numpy(random.integers(values, size=(40, 25)) / 7).float()
    relevant = torch.from_numpy(random.random((40, 25)) < 0.3)
    relevant[0], relevant[1] = False, True
    left_out = torch.from_numpy(random.random((40, 25)) < 0.2)
    for out in (None, left_out):
        found = ranked(scores, relevant, out)
        for row in range(40):
            kept = torch.ones(25, dtype=torch.bool) if out is None else ~out[row]
            if not (relevant[row] & kept).any():
                assert found.precision[row].isnan() and found.first[row] == 25
                continue
            reference = average_precision_score(relevant[row, kept].numpy(), scores[row, kept].numpy())
            assert float(found.precision[row]) == pytest.approx(reference, abs=1e-6)


def test_mean_average_precision_and_recall_are_torchmetrics_where_scores_differ():
    generator = torch.Generator().manual_seed(0)
    scores, relevant = torch.rand(30, 50, generator=generator), torch.rand(30, 50, generator=generator) < 0.1
    relevant[:, 0] = True
    found = ranked(scores, relevant)
    queries = torch.arange(30)[:, None].expand(30, 50).flatten()
    reference = RetrievalMAP()(scores.flatten(), relevant.flatten(), indexes=queries)
    assert float(found.precision.mean()) == pytest.approx(float(reference), abs=1e-6)
    for k in (1, 5, 10):
        hits = RetrievalHitRate(top_k=k)(scores.flatten(), relevant.flatten(), indexes=queries)
        assert float((found.first < k).float().mean()) == pytest.approx(float(hits), abs=1e-6)


def test_scores_that_are_all_equal_look_like_chance_in_any_order():
    relevant = torch.zeros(2, 100, dtype=torch.bool)
    relevant[0, :10], relevant[1, 90:] = True, True  # the files' order must not matter
    found = ranked(torch.ones(2, 100), relevant)
    assert found.precision.tolist() == pytest.approx([0.1, 0.1])
    assert found.first.tolist() == [45, 45]


@pytest.mark.parametrize("values", [1000, 5, 1])
def test_micro_average_precision_is_scikit_learns_over_all_pairs(values):
    random = np.random.default_rng(values)
    scores, right = random.integers(values, size=400) / 3, random.random(400) < 0.2
    weights = random.integers(0, 4, 400)
    assert micro_average_precision(scores, right, right.sum()) == pytest.approx(
        average_precision_score(right, scores)
    )
    assert micro_average_precision(scores, right, (right * weights).sum(), weights) == pytest.approx(
        average_precision_score(right, scores, sample_weight=weights)
    )
    # What was never proposed counts as if it came last, at no precision.
    assert micro_average_precision(scores, right, 2 * right.sum()) == pytest.approx(
        average_precision_score(right, scores) / 2
    )
    precision, recall, thresholds = precision_recall_curve(right, scores)
    for least in (0.1, 0.25, 0.9):
        good = np.flatnonzero((precision[:-1] >= least) & (recall[:-1] > 0))
        expected = (
            (recall[good].max(), thresholds[good[recall[good].argmax()]]) if len(good) else (0.0, np.inf)
        )
        assert recall_at_precision(scores, right, right.sum(), least) == pytest.approx(expected)


def test_nothing_to_find_has_no_figure():
    none = np.zeros(0), np.zeros(0, dtype=bool)
    assert np.isnan(micro_average_precision(*none, 0))
    assert micro_average_precision(*none, 3) == 0
    assert recall_at_precision(*none, 3, 0.9) == (0.0, np.inf)
