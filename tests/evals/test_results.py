"""Intervals equal those of drawing pictures again, and a result says its figures in their own units."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from evals.bootstrap import of_mean, of_statistic, of_sums
from evals.results import Outcome, _intervals, between, described, valued


def test_the_interval_of_a_mean_is_that_of_drawing_pictures_again():
    scores = np.random.default_rng(0).random(400).round(1)
    draws = np.random.default_rng(1).integers(0, 400, (4000, 400))
    reference = np.percentile(100 * scores[draws].mean(1), [2.5, 97.5])
    assert of_mean(scores) == pytest.approx(reference, abs=0.3)
    assert of_mean(np.ones(5)) == (100.0, 100.0)
    fine = scores + np.random.default_rng(2).random(400) * 1e-6  # as many values as pictures
    assert of_mean(fine) == pytest.approx(reference, abs=0.3)


def test_the_interval_of_sums_is_that_of_drawing_pictures_again():
    random = np.random.default_rng(0)
    parts = random.integers(0, 50, (120, 3, 3))

    def iou(counts):
        right = np.diagonal(counts, axis1=-2, axis2=-1)
        return (right / (counts.sum(-1) + counts.sum(-2) - right)).mean(-1)

    draws = np.random.default_rng(1).integers(0, 120, (4000, 120))
    reference = np.percentile(iou(parts[draws].sum(1)), [2.5, 97.5])
    assert of_sums(parts, iou) == pytest.approx(reference, abs=0.003)


def test_the_interval_of_any_figure_is_that_of_drawing_pictures_again():
    random = np.random.default_rng(0)
    truth, scores = random.random(150) < 0.3, random.random(150)
    scores[truth] += 0.4
    found = of_statistic(lambda counts: average_precision_score(truth, scores, sample_weight=counts), 150)
    draws = np.random.default_rng(1).integers(0, 150, (1000, 150))
    again = [average_precision_score(truth[rows], scores[rows]) for rows in draws]
    assert found == pytest.approx(np.percentile(again, [2.5, 97.5]), abs=0.03)
    assert of_statistic(lambda counts: counts[0] or np.nan, 3)[0] == 1  # draws that leave it undefined
    assert np.isnan(of_statistic(lambda counts: np.nan, 3)).all()


def test_a_result_says_its_figures_in_their_own_units():
    result = {
        "headline": "rmse",
        "metrics": {"delta1": 91.234, "rmse": 0.51234, "rank": 12345.6},
        "units": {"delta1": "%", "rmse": "m", "rank": ""},
        "intervals": {"rmse": (0.5, 0.525), "delta1": (90.0, 92.0)},
    }
    assert described(result) == "rmse 0.5123 m (0.5 to 0.525), delta1 91.23% (90.0 to 92.0), rank 12,346"
    assert valued(result, "delta1") == "91.2%"
    del result["units"]  # a result of format 1.0
    assert valued(result, "rmse") == "0.5%"
    assert between(result, "rank") == ""
    away = np.random.default_rng(0).random(400)
    metres = Outcome(headline="rmse", metrics={"rmse": 0.5}, units={"rmse": "m"}, scores={"rmse": away})
    assert _intervals(metres)["rmse"] == pytest.approx(np.array(of_mean(away)) / 100)
    with pytest.raises(ValueError, match="top2: not among the metrics"):
        Outcome(headline="top1", metrics={"top1": 1.0}, lower=("top2",))
