"""A suite by the command: what is left out, what fails, what continues; and comparing what came of it."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from dinov2.config import configs_folder
from dinov2.exits import UserError
from evals import compare
from evals.__main__ import main
from evals.registry import TASKS
from evals.suite import Suite
from tests.evals.small import small_backbone
from tests.faults import assert_survives, when
from tests.pictures import class_folder

RUNS = [
    {"task": "knn", "data": "{classes}", "k": [1, 5]},
    {"task": "retrieval", "test": "{classes}/val"},
    {"task": "keypoints", "data": "{classes}", "name": "broken"},
    {"task": "knn", "name": "other", "train": "{classes}/train", "test": "{elsewhere}"},
]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    class_folder(tmp_path / "data" / "train", classes=3, each=5)
    class_folder(tmp_path / "data" / "val", classes=3, each=3, first=50)
    sets = {"classes": "labelled pictures", "elsewhere": "others"}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"sets": sets, "runs": RUNS}))
    small_backbone(tmp_path)
    return tmp_path


def words(place: Path, backbone: str = "", *more: str) -> list[str]:
    return [
        backbone or str(place / "backbone"),
        f"suite={place / 'own.yaml'}",
        f"classes={place / 'data'}",
        "size=32",
        f"output={place / 'out'}",
        f"cache={place / 'cache'}",
        *more,
    ]


def results(place: Path) -> list[Path]:
    return sorted((place / "out" / "results").glob("*.json"))


def test_one_failing_task_costs_no_other_and_what_is_done_stays(place, capsys):
    with pytest.raises(UserError, match=r"1 of 3 failed, the others are done \(broken: there are no pairs"):
        main(words(place))
    said = capsys.readouterr()
    assert "other: left out, for it needs elsewhere=" in said.out
    assert "2 of 3 done" in said.out
    assert "broken: failed: there are no pairs" in said.err
    done = results(place)
    assert [json.loads(path.read_text())["task"] for path in done].count("knn") == 1
    assert all(json.loads(path.read_text())["settings"]["size"] == 32 for path in done)
    before = [path.stat().st_mtime_ns for path in done]
    folder = place / "pairs" / "PairAnnotation" / "test"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match="1 of 4 failed"):
        main(words(place, "", f"elsewhere={place / 'data' / 'val'}"))
    assert set(done) < set(results(place))
    assert [path.stat().st_mtime_ns for path in done] == before


def test_settings_go_to_all_tasks_or_to_one(place, capsys):
    main(words(place, "", "knn.k=[3]", "seed=4", "--check"))
    lines = capsys.readouterr().out.splitlines()
    (knn,) = [line for line in lines if line.startswith("knn")]
    assert knn.endswith("k=[3]") and "k=[1, 5] size=32" in knn and "seed=4" in knn
    assert not results(place)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["clases=x"], "did you mean 'classes'"),
        (["sizes=32"], "did you mean 'size'"),
        (["knn.kk=3"], "no task a setting"),
        (["knn.k=[0]"], "knn classes: k="),
        (["data=x"], "no task a setting, 'data'"),
    ],
)
def test_a_typo_is_said_before_anything_starts(place, more, said):
    with pytest.raises(UserError, match=said):
        main(words(place, "", *more))
    assert not results(place)


def test_a_suite_that_names_what_is_not_there_says_so(place):
    for changed, said in [
        ({"runs": [{"task": "knnn"}]}, "no task 'knnn'; did you mean 'knn'"),
        ({"runs": [{"task": "knn", "data": "{mine}"}]}, "needs a set 'mine'"),
        ({"runs": 3}, "is no suite"),
    ]:
        (place / "own.yaml").write_text(yaml.safe_dump({"sets": {"classes": "x"}} | changed))
        with pytest.raises(UserError, match=said):
            main(words(place))
    with pytest.raises(UserError, match="there is no suites recipe 'smal'; did you mean 'small'"):
        main([str(place / "backbone"), "suite=smal", "output=out"])


@pytest.mark.parametrize("name", ["small", "full"])
def test_the_suites_that_ship_can_be_read(name, place, capsys):
    suite = Suite.read(configs_folder() / "suites" / f"{name}.yaml")
    given = [f"{one}=somewhere" for one in suite.sets]
    main([str(place / "backbone"), f"suite={name}", *given, "output=out", "--check"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(suite.runs)
    assert {run.task for run in suite.runs} <= set(TASKS)


def test_backbones_beside_each_other_and_beside_the_papers(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    for backbone in ("", f"untrained:{place / 'backbone'}?seed=3"):
        with pytest.raises(UserError, match="1 of 3 failed"):
            main(words(place, backbone))
    capsys.readouterr()
    compare.main(["out", "output=page.html"])
    text = capsys.readouterr().out
    assert text.count("untrained:") == 2
    assert "DINO ViT-S/16" in text and "differs: data imagenet (50,000 tested), size 224, k 20" in text
    page = (place / "page.html").read_text()
    assert all(f'href="out/results/{path.stem}.html"' in page for path in results(place))
    compare.main([str(path) for path in results(place)])
    assert text.split("* best")[0] == capsys.readouterr().out.split("* best")[0]
    compare.main(["out/results.jsonl"])
    assert text.split("* best")[0] == capsys.readouterr().out.split("* best")[0]
    (place / "cut.jsonl").write_text('{"task": "kn')
    for wrong in (["nowhere"], ["."], ["own.yaml"], ["cut.jsonl"], ["page=x"], []):
        with pytest.raises((UserError, SystemExit)):
            compare.main(wrong)


def test_a_killed_suite_continues_to_the_same_results(place, tmp_path):
    """Killed with one result there, and the features of the next task without their result."""

    def numbers(path: Path):
        text = path.read_text()
        lines = text.splitlines() if path.suffix == ".jsonl" else [text]
        return [json.loads(line) | {"seconds": None} for line in lines]

    runs = [
        {"task": "knn", "data": "{classes}", "k": [1, 5]},
        {"task": "retrieval", "test": "{classes}/val", "token": "gem"},
        {"task": "health", "data": "{classes}/val"},
    ]
    (place / "own.yaml").write_text(yaml.safe_dump({"sets": {"classes": "x"}, "runs": runs}))
    assert_survives(
        [sys.executable, "-m", "evals", *words(place)[:-2], "output=out", f"cache={place / 'cache'}"],
        tmp_path / "runs",
        results=["out/results.jsonl", "out/report.html", "out/results/[!.]*", "out/features/*/*/*.npy"],
        read={
            "out/results.jsonl": numbers,
            "out/results/*.json": numbers,
            "out/results/*.html": lambda page: None,  # it says seconds; that it is there is enough
        },
        moments=[when("out/features/*/gem/meta.json")],
        env={"OMP_NUM_THREADS": "1"},
    )


def entry(backbone: str, value: float, low: float, high: float, **more: object) -> compare.Entry:
    result = {
        "task": "depth",
        "backbone": {"spec": backbone},
        "data": {"test": {"name": "rooms", "fingerprint": "f", "pictures": 9}},
        "settings": {"size": 32},
        "headline": "rmse",
        "metrics": {"rmse": value},
        "units": {"rmse": "m"},
        "intervals": {"rmse": [low, high]},
    }
    return compare.Entry(result | more, None)


def test_the_best_is_marked_only_where_intervals_do_not_overlap():
    lower = {"lower_is_better": ["rmse"]}
    apart = [entry("a", 0.4, 0.3, 0.5, **lower), entry("b", 0.6, 0.51, 0.7, **lower)]
    near = [entry("a", 0.4, 0.3, 0.5, **lower), entry("b", 0.6, 0.5, 0.7, **lower)]
    assert compare.columns_of(apart)[0].best() == "a"
    assert compare.columns_of(near)[0].best() is None
    assert compare.columns_of([entry("a", 0.4, 0.3, 0.5), entry("b", 0.6, 0.51, 0.7)])[0].best() == "b"
    assert compare.columns_of(apart[:1])[0].best() is None
    without = entry("c", 0.1, 0, 0, intervals={}, **lower)
    assert compare.columns_of([*apart, without])[0].best() is None
    assert "0.4 m *" in compare.as_text(compare.columns_of(apart), ["a", "b"])
    other = entry("a", 0.4, 0.3, 0.5, settings={"size": 64})
    assert [column.said for column in compare.columns_of([*apart, other])] == ["size=32", "size=64"]
