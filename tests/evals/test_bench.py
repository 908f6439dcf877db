"""Features: kept once, within a bound, by several processes; and several ranks that give what one gives."""

import json
import os
import subprocess
import sys

import numpy as np
from PIL import Image

from evals.__main__ import main
from evals.store import Store
from tests.ranks import on_ranks

HOLD = "from pathlib import Path; from evals.store import Store; s = Store(Path('.'), 0); s.hold('held'); "
HOLD += "print('held', flush=True); input()"
SMALL = ["size=32", "batch=16"]


def keep(store: Store, key: str, size: int) -> None:
    folder = store.hold(key)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "00000.npy").write_bytes(bytes(size))


def test_what_was_unused_longest_goes_first_and_what_is_held_stays(tmp_path):
    first = Store(tmp_path, 2.5 / 2**20)
    for key in "abcd":
        keep(first, key, 1024)
    assert first.trim() == []  # all are held here
    first.close()
    for age, key in enumerate("bdac"):
        os.utime(tmp_path / f".{key}.lock", ns=(age, age))
    second = Store(tmp_path, 2.5 / 2**20)
    second.hold("b")  # used once more
    (tmp_path / ".part-left").mkdir()  # by a killed process
    (tmp_path / "not ours").mkdir()
    assert second.trim() == ["d", "a"]
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"b", "c", "not ours"}


def test_what_another_process_holds_stays_until_it_ends(tmp_path):
    store = Store(tmp_path, 0)
    keep(store, "held", 10)
    store.close()
    keep(store, "free", 10)
    store.close()
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    assert store.trim() == ["free"]
    child.communicate("\n")
    assert store.trim() == ["held"]


def test_features_beyond_the_bound_are_computed_again(place, tmp_path):
    def run(task, *words):
        main([str(place / "backbone"), task, *SMALL, f"data={place / 'data'}", f"output={tmp_path}", *words])

    run("knn", "features_gib=0")
    run("knn", "size=48", "features_gib=0")  # the first size's features are in no use any more
    assert len(list(tmp_path.glob("features/*/*/meta.json"))) == 2
    run("fewshot", "shots=[5]", "features_gib=1")
    assert len(list(tmp_path.glob("features/*/*/meta.json"))) == 4


def test_tasks_in_two_processes_compute_features_once(place, tmp_path):
    words = [*SMALL, f"data={place / 'data'}", "output=out", f"cache={place / 'cache'}"]
    env = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "evals", str(place / "backbone"), task, *words], cwd=tmp_path, env=env
        )
        for task in ("knn", "fewshot")
    ]
    assert [child.wait() for child in children] == [0, 0]
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 2
    assert len(list(tmp_path.glob("out/features/*/*/meta.json"))) == 2


def evaluate_all(commands: list[list[str]], failing: list[str]) -> str:
    """On each rank: run the commands, and one that fails; returns how that one ended."""
    for words in commands:
        main(words)
    try:
        main(failing)
    except BaseException as error:
        return type(error).__name__
    return "done"


def test_two_ranks_give_what_one_gives(place, tmp_path):
    """Enough pictures for two pieces of features, some of which cannot be read."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 1100), ("val", 40)):
        for number in range(count):
            folder = tmp_path / "data" / part / f"class_{number % 4}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8) // (1 + number % 4)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "data" / "train" / "class_0" / "0.png").write_bytes(b"no picture")
    tasks = [
        ["knn"],
        ["corruptions", "kinds=[contrast,fog,snow]", "strengths=[1]"],
        ["linear", "iterations=70", "batch_size=4", "learning_rates=[0.01,0.1]", "save_every=50"],
    ]

    def commands(output):
        settings = ["size=16", "resize=16", f"data={tmp_path / 'data'}", f"cache={tmp_path / 'cache'}"]
        return [[str(place / "backbone"), *words, *settings, f"output={output}"] for words in tasks]

    failing = [*commands(tmp_path / "two")[0], "size=30"]
    assert evaluate_all(commands(tmp_path / "one"), failing) == "UserError"
    endings = on_ranks(2, evaluate_all, commands(tmp_path / "two"), failing)
    assert endings == ["UserError", "SystemExit"]  # the first says why, and the others do not wait for it
    for path in sorted((tmp_path / "one").glob("features/*/*/*.npy")):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
    results = [
        {path.name: json.loads(path.read_text()) for path in (tmp_path / name / "results").glob("*.json")}
        for name in ("one", "two")
    ]
    assert set(results[0]) == set(results[1]) and len(results[0]) == 3
    for name, one in results[0].items():
        two = results[1][name]
        for key in one.keys() - {"seconds"}:
            assert one[key] == two[key], key
    assert len(list((tmp_path / "two").glob("features/*/*/00001.npy"))) > 0
