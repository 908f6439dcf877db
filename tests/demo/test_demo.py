"""The demo from end to end, tiny: the programs fit together, and a killed demo goes on."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
TINY = """
steps: 4
batch: 8
precision: fp32
model: {size: vit_tiny, depth: 1, patch: 8, registers: 1, drop_path: 0.0}
heads:
  dino: {hidden: 32, bottleneck: 16, prototypes: 32}
augment: {global_size: 32, local_size: 16, local_crops: 2}
knn: {size: 32, resize: 32, k: 5}
checkpoint: {every: 2}
tensorboard: false
workers: 0
"""
FEW = [
    f"plan.{word}"
    for word in ("most_training=10", "most_test=4", "fewest_seeds=3", "copies=6", "corrupt=3", "drawings=6")
]


def demo(*words: str, status: int | None = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "demo", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,  # 50 s on two quiet cores
    )
    assert status is None or done.returncode == status, done.stderr
    return done


def recipe(folder: Path) -> str:
    path = folder / "tiny.yaml"
    path.write_text(TINY)
    return f"training={path}"


@pytest.mark.timeout(600)
def test_pictures_to_page_through_a_kill(tmp_path: Path):
    output = tmp_path / "out"
    words = [f"output={output}", recipe(tmp_path), *FEW, "workers=1"]
    program = subprocess.Popen(
        [sys.executable, "-m", "demo", *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (output / "curated" / "stages" / "ingest").exists():
        assert program.poll() is None
        time.sleep(0.05)
    program.kill()
    program.wait()

    done = demo(*words)
    assert "making the pictures: done before" in done.stdout
    assert done.stdout.rstrip().endswith(f"The page: {output / 'report.html'}")
    page = (output / "report.html").read_text()
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//", page)  # needs no network
    text = re.sub(r"<[^>]+>", " ", page)
    for result in map(json.loads, (output / "evals" / "results.jsonl").read_text().splitlines()):
        assert f"{result['metrics'][result['headline']]:.1f}%" in text
    assert re.search(r"exact copies\s+6\s+6\s+100.0%", text)
    assert re.search(r"corrupt files\s+3\s+3\s+100.0%", text)
    assert "recognising scenes, no more" in text

    again = demo(*words)
    assert again.stdout.count("done before") == 5
    other = demo(*words, "seed=1", status=2)
    assert "seed (0 there, 1 here)" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.long
def test_pictures_without_labels_make_a_page(tmp_path: Path):
    random = np.random.default_rng(0)
    (tmp_path / "own").mkdir()
    for number in range(104):
        cells = random.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(cells).resize((48, 40)).save(tmp_path / "own" / f"{number}.png")
    (tmp_path / "own" / "broken.jpg").write_bytes(b"no picture")
    done = demo(f"output={tmp_path / 'out'}", f"images={tmp_path / 'own'}", recipe(tmp_path), "workers=1")
    text = re.sub(r"<[^>]+>", " ", (tmp_path / "out" / "report.html").read_text())
    assert "have no labels" in text
    assert "evaluating" not in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["images=nowhere"], "images=nowhere is no folder"),
        (["images=few"], "too few to train on"),
        (["image=few"], "did you mean 'images'"),
        (["curation=demmo"], "did you mean 'demo'"),
        ([], "output= is missing"),
    ],
)
def test_what_the_user_can_mend_is_one_line(tmp_path: Path, words: list[str], says: str):
    (tmp_path / "few").mkdir()
    for name in "abc":
        Image.new("RGB", (40, 40), name and "red").save(tmp_path / "few" / f"{name}.png")
    given = [*words] + ([f"output={tmp_path / 'out'}"] if words else [])
    done = subprocess.run(
        [sys.executable, "-m", "demo", *given],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
