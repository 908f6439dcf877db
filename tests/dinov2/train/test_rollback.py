"""Runs that go astray, by real faults: they go back, past the bad batches, or give up with a report."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dinov2.data.sources import open_source
from dinov2.models import load_backbone
from tests.dinov2.train.runs import finish, lines_of, train_words
from tests.faults import assert_survives, when

POISONED = "tests.poisoned"


@pytest.fixture(scope="module")
def with_a_bad_one(pictures: Path) -> Path:
    """The 24 pictures, and one of a single colour."""
    root = pictures / "with_a_bad_one"
    root.mkdir()
    Image.new("RGB", (96, 80), (200, 30, 60)).save(root / "grey.png")
    return root


def _journal(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "rollbacks.json").read_text())


@pytest.mark.long
def test_bad_batches_are_cut_out_and_a_killed_run_cuts_the_same(
    pictures: Path, with_a_bad_one: Path, tmp_path: Path
):
    data = f"data={pictures / 'train'},{with_a_bad_one}"
    assert_survives(
        train_words(pictures, "max_skipped=1", data, "steps=10", module=POISONED),
        tmp_path,
        results=["run/backbone/*", "run/metrics.jsonl", "run/rollbacks.json"],
        moments=[when("run/rollbacks.json")],
        read={"run/metrics.jsonl": lines_of},
        env={"FAULT": "constant"},
    )
    run = tmp_path / "whole" / "run"
    lines = lines_of(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert all(line["loss"] is not None for line in lines), "a bad batch was kept"
    bad = open_source(data.removeprefix("data=")).ids[-1]
    cuts = _journal(run)
    assert cuts and all(bad in cut["pictures"] and "loss dino" in cut["what"] for cut in cuts)
    seen = [step + sum(c["last"] - c["first"] for c in cuts if c["to"] <= step) for step in range(10)]
    cut_out = {batch for cut in cuts for batch in range(cut["first"], cut["last"])}
    assert seen == [batch for batch in range(seen[-1] + 1) if batch not in cut_out]


@pytest.mark.long
def test_damaged_weights_are_neither_saved_nor_exported_and_the_run_recovers(pictures: Path, tmp_path: Path):
    clean, hurt = (tmp_path / name for name in ("clean", "hurt"))
    clean.mkdir()
    hurt.mkdir()
    assert finish(train_words(pictures), clean).returncode == 0
    done = finish(
        train_words(pictures, "max_skipped=3", "max_rollbacks=1", module=POISONED),
        hurt,
        env={"FAULT": "weights:6"},
    )
    assert done.returncode == 0, done.stderr
    (cut,) = _journal(hurt / "run")
    assert (cut["to"], cut["first"]) == (4, 4) and "not finite" in cut["what"]
    ours, theirs = (lines_of(folder / "run" / "metrics.jsonl") for folder in (hurt, clean))
    assert ours[:4] == theirs[:4] and len(ours) == len(theirs)
    assert all(line["loss"] is not None for line in ours)
    weights = load_backbone(str(hurt / "run" / "backbone")).state_dict().values()
    assert all(bool(tensor.isfinite().all()) for tensor in weights)


def test_a_run_that_explodes_goes_back_and_then_gives_up_with_a_report(pictures: Path, tmp_path: Path):
    explosive = ["optim.lr=1e30", "optim.warmup=0", "precision=fp32"]
    done = finish(train_words(pictures, *explosive, "max_skipped=3", "max_rollbacks=2"), tmp_path)
    assert done.returncode == 70, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "3 steps in a row were not finite: loss dino, ibot, koleo" in last and "2 times" in last
    report = (tmp_path / "run" / "failure.md").read_text()
    first_step = open_source(str(pictures / "train")).ids
    assert sum(picture in report for picture in first_step) == 8, "the batch of the last step by its ids"
    assert "to step 0" in report and "optim.lr" in report
    assert not (tmp_path / "run" / "backbone").exists()
