"""The command on real files: its numbers, its results, its cache, its errors, and being killed."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from dinov2.exits import UserError
from dinov2.models import load_backbone
from evals.__main__ import main
from evals.backbones import load
from tests.evals.small import evaluated, features_of
from tests.faults import assert_survives, when
from tests.pictures import class_folder, encoded, picture

SMALL = ["size=32", "batch=16"]
QUICK = [*SMALL, "augment=false", "iterations=40", "batch_size=16", "learning_rates=[0.01,0.3]"]


def test_knn_equals_scikit_learns_on_the_same_features(place, tmp_path, capsys):
    result = evaluated(place, tmp_path / "out", "knn", *SMALL, "k=[1,5,20,50]")
    found = features_of(tmp_path / "out", result)
    labels = {part: np.repeat([0, 1, 2], len(rows) // 3) for part, rows in found.items()}
    for k in (1, 5, 20):
        votes = KNeighborsClassifier(
            k,
            metric="cosine",
            algorithm="brute",
            weights=lambda d: np.exp((1 - d) / 0.07),  # pyright: ignore[reportArgumentType]  # a callable is documented
        )
        votes.fit(found["train"], labels["train"])
        reference = 100 * votes.score(found["test"], labels["test"])
        assert result["metrics"][f"top1_k{k}"] == pytest.approx(reference)
    balanced = balanced_accuracy_score(labels["test"], votes.predict(found["test"]))
    assert result["metrics"]["mean_class"] == pytest.approx(100 * balanced)  # of k = 20
    assert "top1_k50" not in result["metrics"]
    assert result["headline"] == "top1_k20"
    assert result["metrics"]["top1_k20"] > 60
    low, high = result["intervals"]["top1_k20"]
    assert low <= result["metrics"]["top1_k20"] <= high
    assert result["data"]["train"]["pictures"] == 36
    assert "top1_k20" in capsys.readouterr().out


def test_a_second_command_finds_the_result_and_tables_are_made_anew(place, tmp_path):
    evaluated(place, tmp_path, "knn", *SMALL)
    evaluated(place, tmp_path, "knn", "size=32", "per_class=2", "tries=3")
    evaluated(place, tmp_path, "knn", *SMALL, backbone="pixels")
    evaluated(place, tmp_path, "knn", *SMALL, backbone=f"untrained:{place / 'backbone'}?seed=1")
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert {line["details"]["training_pictures"] for line in lines} == {36, 6}
    names = list((tmp_path / "results").glob("*.json"))
    times = [path.stat().st_mtime_ns for path in names]
    with pytest.raises(ValueError, match="unpack"):  # no new file
        evaluated(place, tmp_path, "knn", "size=32", "batch=7")
    assert [path.stat().st_mtime_ns for path in names] == times
    page = (tmp_path / "report.html").read_text()
    assert page.count("results/") == 4
    assert all((tmp_path / "results" / f"{path.stem}.html").exists() for path in names)


def test_linear_learns_and_chooses_as_it_is_told(place, tmp_path):
    published = evaluated(place, tmp_path, "linear", *QUICK)
    heads = published["details"]["heads"]
    assert len(heads) == 2 * 2 * 2
    assert {head["blocks"] for head in heads} == {1, 2}  # the backbone has two blocks
    assert published["metrics"]["top1"] == max(head["top1"] for head in heads) > 60
    held = evaluated(place, tmp_path, "linear", *QUICK, "select=holdout", "holdout=0.25")
    best = max(held["details"]["heads"], key=lambda head: head["holdout_top1"])
    assert held["details"]["best"]["holdout_top1"] == best["holdout_top1"]
    assert held["metrics"]["top1"] == held["details"]["best"]["top1"]
    crops = evaluated(place, tmp_path, "linear", *QUICK, "augment=true", "iterations=20", "workers=1")
    assert crops["metrics"]["top1"] > 50


def test_tasks_share_features(place, tmp_path):
    evaluated(place, tmp_path / "both", "linear", *QUICK)
    folders = set((tmp_path / "both").glob("features/*/*"))
    after = evaluated(place, tmp_path / "both", "knn", *SMALL)
    assert set((tmp_path / "both").glob("features/*/*")) == folders
    alone = evaluated(place, tmp_path / "alone", "knn", *SMALL)
    assert after["metrics"] == alone["metrics"]


def test_untrained_has_the_architecture_and_other_weights(place):
    trained = load(str(place / "backbone"), "cpu")
    first, again, other = (
        load(f"untrained:{place / 'backbone'}{seed}", "cpu") for seed in ("", "?seed=0", "?seed=1")
    )
    assert first.architecture() == trained.architecture()
    assert first.weights_hash() == again.weights_hash()
    assert len({model.weights_hash() for model in (trained, first, other)}) == 3
    timm = load("untrained:timm:vit_tiny_patch16_224?seed=4", "cpu")
    assert timm.weights_hash() == load_backbone("timm:vit_tiny_patch16_224?seed=4").weights_hash()


def test_two_at_once_measure_once(place, tmp_path):
    words = [str(place / "backbone"), "knn", *SMALL, f"data={place / 'data'}", f"output={tmp_path}"]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(main, [[*words, f"cache={place / 'cache'}"]] * 2))
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["BACKBONE"], "name a backbone and a task"),
        (["BACKBONE", "knnn"], "did you mean 'knn'"),
        (["nowhere", "knn", "data=DATA"], "no backbone at 'nowhere'"),
        (["BACKBONE", "knn"], "give train=… and test=…"),
        (["BACKBONE", "knn", "data=DATA", "train=DATA"], "not both"),
        (["BACKBONE", "knn", "data=nothing"], "does not exist"),
        (["BACKBONE", "knn", "data=DATA/train"], "needs a train and a val part"),
        (["BACKBONE", "knn", "train=flat", "test=DATA/val"], "have no label"),
        (["BACKBONE", "knn", "train=one", "test=one"], "train and test are the same pictures"),
        (["BACKBONE", "knn", "train=one", "test=DATA/val"], "give two or more classes"),
        (
            ["BACKBONE", "knn", "train=DATA/val", "test=other"],
            "1 classes of the test part, other, are not in the training part, data-val: cat",
        ),
        (["BACKBONE", "knn", "data=DATA", "size=30"], "does not divide"),
        (["BACKBONE", "knn", "data=DATA", "k=[0]"], "numbers from 1 up"),
        (["BACKBONE", "knn", "data=DATA", "per_class=13"], "the smallest class has 12"),
        (["BACKBONE", "knn", "data=DATA", "precision=half"], "precision=half"),
        (["BACKBONE", "linear", "data=DATA", "select=best"], "select=best"),
        (["BACKBONE", "linear", "data=DATA", "select=holdout", "holdout=0.99"], "leaves no picture"),
        (["pixels", "linear", "data=DATA"], "serves as a baseline for tasks on vectors"),
        (["BACKBONE", "knn", "data=DATA", "output=taken"], "holds something else"),
    ],
)
def test_what_cannot_be_measured_says_why(place, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    class_folder(tmp_path / "one", classes=1, each=2)
    (tmp_path / "flat").mkdir()
    (tmp_path / "other" / "cat").mkdir(parents=True)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    for path in ("flat/a.png", "other/cat/a.png"):
        (tmp_path / path).write_bytes(encoded(picture(0, 0)))
    named = {"BACKBONE": str(place / "backbone"), "DATA": str(place / "data")}
    for short, long in named.items():
        words = [word.replace(short, long) for word in words]
    with pytest.raises(UserError, match=said):
        main(
            [*words, *SMALL[1:], "output=out", f"cache={place / 'cache'}"]
            if "output=taken" not in words
            else words
        )
    assert not list(tmp_path.glob("out/results/*"))


@pytest.mark.long  # a killed suite is among the quick ones
def test_a_killed_command_continues_to_the_same_numbers(place, tmp_path):
    def numbers(path: Path):
        result = json.loads(path.read_text())
        return {key: value for key, value in result.items() if key != "seconds"}

    words = [*QUICK[:-1], "iterations=200", "save_every=20", "learning_rates=[0.01,0.1]"]
    words += [f"data={place / 'data'}", "output=out", f"cache={place / 'cache'}"]
    assert_survives(
        [sys.executable, "-m", "evals", str(place / "backbone"), "linear", *words],
        tmp_path,
        results=["out/results/*.json", "out/features/*/*/*.npy"],
        read={"out/results/*.json": numbers},
        moments=[when("out/work/*/heads.safetensors")],
        env={"OMP_NUM_THREADS": "1"},  # the products are too small for more
    )
