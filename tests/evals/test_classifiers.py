"""Classifiers on features against scikit-learn, on random and degenerate rows; and their commands."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    accuracy_score,
    adjusted_rand_score,
    balanced_accuracy_score,
    normalized_mutual_info_score,
)
from sklearn.neighbors import NearestCentroid

from dinov2.exits import UserError
from dinov2.neighbours import knn_classify
from evals.clustering import adjusted_rand, contingency, matching, mutual_information
from evals.fewshot import interval_of_tries, nearest_centroid
from evals.heads import HeadGrid, Kind
from evals.logistic import Logistic
from evals.per_class import mean_per_class
from tests.evals.small import evaluated, features_of
from tests.faults import assert_survives, when
from tests.pictures import class_folder

SMALL = ["size=32", "batch=16"]


def blobs(count, classes, dim=12, spread=1.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    middles = torch.randn(classes, dim, generator=generator)
    return middles[labels] + spread * torch.randn(count, dim, generator=generator), labels


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_a_warm_start_leads_to_scikit_learns_solution(classes):
    (rows, labels), (queries, _) = blobs(120, classes), blobs(200, classes, seed=1)
    model = Logistic(tolerance=1e-6)
    for c in (1e-4, 1e-2, 1.0, 10.0):
        ours = model.fit(rows, labels, c).predict(queries)
        cold = LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(rows.double().numpy(), labels.numpy())
        reference = torch.from_numpy(cold.predict(queries.double().numpy()))
        assert (ours == reference).double().mean() > 0.98


def test_features_that_hardly_differ_are_learnt_all_the_same():
    """As a network with fresh weights gives them: a thousandth of their mean apart."""
    (rows, labels), (queries, truth) = blobs(120, 3, spread=0.3), blobs(120, 3, spread=0.3, seed=0)
    near = [3.0 + 1e-3 * part for part in (rows, queries)]
    model = Logistic()
    for c in (1e-2, 1e2, 1e5):
        answers = model.fit(near[0], labels, c).predict(near[1])
    assert (answers == truth).double().mean() > 0.98


def test_answers_are_among_those_allowed():
    rows, labels = blobs(60, 4)
    allowed = torch.tensor([False, True, False, True])
    scores = LogisticRegression().fit(rows.numpy(), labels.numpy()).decision_function(rows.numpy())
    best = torch.from_numpy(np.array([1, 3])[scores[:, [1, 3]].argmax(1)])
    assert (Logistic().fit(rows, labels, 1.0).predict(rows, allowed) == best).double().mean() > 0.95
    assert set(nearest_centroid(rows, labels, rows, allowed).tolist()) <= {1, 3}
    votes = knn_classify(rows, labels, rows, classes=4, k=[1, 60], allowed=allowed)
    assert all(set(answers.tolist()) <= {1, 3} for answers in votes.values())
    everything = knn_classify(rows, labels, rows, classes=4, k=[60])[60]
    kept = allowed[everything]
    assert torch.equal(votes[60][kept], everything[kept])  # a winner that is allowed stays the winner
    grid = HeadGrid([Kind(1, False, slice(0, 12))], [0.1], 4, iterations=1, seed=0)
    answers = grid.predict(rows, allowed)
    scores = rows @ grid.weights[0][:, :-1].T
    assert torch.equal(answers[0], scores.masked_fill(~allowed, -torch.inf).argmax(1))


def test_the_nearest_centroid_is_scikit_learns():
    (rows, labels), (queries, _) = blobs(35, 5), blobs(80, 5, seed=1)
    centre = rows.mean(0)
    unit = [torch.nn.functional.normalize(part - centre, dim=1).numpy() for part in (rows, queries)]
    reference = NearestCentroid().fit(unit[0], labels.numpy()).predict(unit[1])
    ours = nearest_centroid(rows, labels, queries, torch.ones(5, dtype=torch.bool))
    assert np.array_equal(ours.numpy(), reference)


@pytest.mark.parametrize("classes", [2, 7])
def test_the_mean_per_class_is_scikit_learns(classes):
    random = np.random.default_rng(classes)
    truth = random.integers(0, classes, 200) ** 2  # of different sizes, and numbers that no picture has
    answer = np.where(random.random(200) < 0.6, truth, 0)
    figure, (low, high) = mean_per_class((answer == truth).astype(float), torch.from_numpy(truth))
    assert figure == pytest.approx(100 * balanced_accuracy_score(truth, answer))
    draws = (random.integers(0, 200, 200) for _ in range(1000))
    again = [100 * balanced_accuracy_score(truth[rows], answer[rows]) for rows in draws]
    assert (low, high) == pytest.approx(np.percentile(again, [2.5, 97.5]), abs=2)


def test_the_interval_over_tries_is_students():
    values = np.random.default_rng(0).normal(60, 3, 10)
    reference = stats.t.interval(0.95, 9, loc=values.mean(), scale=stats.sem(values))
    assert interval_of_tries(list(values)) == pytest.approx(reference)


@pytest.mark.parametrize(
    ("truth", "cluster"),
    [
        *[tuple(np.random.default_rng(seed).integers(0, 5, (2, 60))) for seed in range(4)],
        (np.arange(30) % 3, np.arange(30) % 3),  # all right, but for names
        (np.arange(30) % 3, np.zeros(30, int)),  # one cluster
        (np.zeros(30, int), np.arange(30) % 4),  # one class
        (np.zeros(30, int), np.zeros(30, int)),  # one of each
        (np.arange(12) % 2, np.arange(12)),  # every picture by itself
        (np.array([0]), np.array([0])),  # a single picture
    ],
)
def test_clusters_are_scored_as_scikit_learn_does(truth, cluster):
    classes, clusters = int(truth.max()) + 1, int(cluster.max()) + 1
    counts = contingency(truth, cluster, classes, clusters)
    assert mutual_information(counts) == pytest.approx(100 * normalized_mutual_info_score(truth, cluster))
    assert adjusted_rand(counts) == pytest.approx(100 * adjusted_rand_score(truth, cluster))
    found = matching(counts)
    used = found[found >= 0]
    assert len(set(used)) == len(used) == min(classes, clusters)
    if max(classes, clusters) <= 5:
        names = [*range(classes), *[-1] * (clusters - classes)]
        best = max(
            (np.array(order)[cluster] == truth).sum() for order in itertools.permutations(names, clusters)
        )
        assert (found[cluster] == truth).sum() == best


def test_the_commands_recognise_classes(place, tmp_path):
    logreg = evaluated(place, tmp_path, "logreg", *SMALL, "values=12")
    assert logreg["metrics"]["top1"] > 60
    grid = logreg["details"]["grid"]
    assert len(grid) == 12 and grid[0]["c"] == pytest.approx(1e-6) and grid[-1]["c"] == pytest.approx(1e5)
    assert logreg["details"]["best"]["holdout_top1"] == max(one["holdout_top1"] for one in grid)
    rows = features_of(tmp_path, logreg)
    model = LogisticRegression(C=logreg["details"]["best"]["c"], max_iter=5000, tol=1e-6)
    answer = model.fit(rows["train"], np.repeat([0, 1, 2], 12)).predict(rows["test"])
    truth = np.repeat([0, 1, 2], 8)
    assert logreg["metrics"]["top1"] == pytest.approx(100 * accuracy_score(truth, answer))
    assert logreg["metrics"]["mean_class"] == pytest.approx(100 * balanced_accuracy_score(truth, answer))
    few = evaluated(place, tmp_path, "fewshot", *SMALL, "shots=[1,5,50]", "tries=4")
    assert few["headline"] == "top1_n5" and set(few["metrics"]) == {"top1_n1", "top1_n5"}
    assert few["metrics"]["top1_n5"] == pytest.approx(np.mean(few["details"]["tries"]["top1_n5"]))
    assert few["metrics"]["top1_n5"] > 50
    low, high = few["intervals"]["top1_n5"]
    assert low <= few["metrics"]["top1_n5"] <= high
    linear = evaluated(place, tmp_path, "fewshot", *SMALL, "shots=[5]", "method=logreg")
    assert linear["metrics"]["top1_n5"] > 50
    clusters = evaluated(place, tmp_path, "clustering", *SMALL)
    assert clusters["metrics"]["accuracy"] > 50
    assert set(clusters["metrics"]) == set(clusters["intervals"]) == {"accuracy", "nmi", "ari"}
    for name, value in clusters["metrics"].items():
        assert clusters["intervals"][name][0] <= value <= clusters["intervals"][name][1]


def test_test_parts_with_other_classes(place, tmp_path):
    """ImageNet-A and R have some of the classes, V2 has numbers, others have classes of their own."""
    test = tmp_path / "test"
    class_folder(test, classes=3, each=6, first=80)
    for number in (0, 2):
        (test / f"class_{number}").rename(test / f"{number:03}")
    (test / "class_1").rename(tmp_path / "away")
    words = ["knn", *SMALL, f"train={place / 'data' / 'train'}", f"test={test}"]
    with pytest.raises(UserError, match="class_map=numbers"):
        evaluated(place, tmp_path / "out", *words)
    by_number = evaluated(place, tmp_path / "out", *words, "class_map=numbers")
    assert by_number["details"]["classes"] == 3
    fewer = evaluated(place, tmp_path / "out", *words, "class_map=numbers", "classes=intersect")
    assert fewer["details"]["classes"] == 2 and fewer["data"]["test"]["pictures"] == 12
    assert fewer["metrics"]["top1_k20"] >= by_number["metrics"]["top1_k20"]
    table = tmp_path / "names.csv"
    table.write_text("# test,learnt\n000,class_0\n")
    with pytest.raises(UserError, match="share 1 classes"):
        evaluated(place, tmp_path / "out", *words, f"class_map={table}", "classes=intersect")
    table.write_text("000,class_0\n002,class_1\n")
    wrong = evaluated(place, tmp_path / "out", *words, f"class_map={table}")
    assert wrong["metrics"]["top1_k20"] < fewer["metrics"]["top1_k20"]  # and not the result of another table
    (test / "unheard_of").mkdir()
    (tmp_path / "away" / next((tmp_path / "away").iterdir()).name).rename(test / "unheard_of" / "a.png")
    words += ["k=[20]", "class_map=numbers", "classes=intersect"]
    left = evaluated(place, tmp_path / "out", *words)
    assert left["details"]["left_out"] == 1
    assert left["metrics"]["top1_k20"] == fewer["metrics"]["top1_k20"]


@pytest.mark.long
def test_a_killed_grid_of_c_continues_to_the_same_numbers(place, tmp_path):
    def numbers(path: Path):
        return {key: value for key, value in json.loads(path.read_text()).items() if key != "seconds"}

    words = [*SMALL, f"data={place / 'data'}", "output=out", f"cache={place / 'cache'}"]
    assert_survives(
        [sys.executable, "-m", "evals", str(place / "backbone"), "logreg", *words],
        tmp_path,
        results=["out/results/*.json", "out/features/*/*/*.npy"],
        read={"out/results/*.json": numbers},
        moments=[when("out/work/*/grid.npz")],
        env={"OMP_NUM_THREADS": "1"},
    )
