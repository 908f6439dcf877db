"""Thresholds are chosen by what they find of copies whose truth is known."""

from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from curation.calibrate import GRID, borrowed, curve, picked
from curation.config import CurateConfig, DuplicatesConfig, LeaksConfig
from dinov2.data.copies import KINDS
from dinov2.exits import UserError
from dinov2.files import read_json
from tests.curation.pools import curate, make_pool, run


def test_a_curve_counts_what_each_threshold_finds() -> None:
    draw = np.random.default_rng(0)
    count, pictures = 400, 9
    right = draw.random(count) < 0.3
    table = pa.table(
        {
            "kind": draw.integers(len(KINDS), size=count),
            "right": right,
            "unlike": ~right & (draw.random(count) < 0.8),
            "cosine": draw.choice(GRID, size=count).astype(np.float32),
        }
    )
    found = curve(table, "cosine", pictures=pictures, scale=2.5).to_pylist()
    rows = table.to_pylist()
    for row in found[:: len(found) // 7]:
        above = [pair for pair in rows if round(pair["cosine"], 4) >= row["threshold"]]
        hits, wrong = sum(pair["right"] for pair in above), 2.5 * sum(pair["unlike"] for pair in above)
        assert row["precision"] == pytest.approx(hits / (hits + wrong))
        assert row["recall"] == pytest.approx(hits / (pictures * len(KINDS)))
        of_one = sum(pair["right"] and pair["kind"] == 3 for pair in above)
        assert row[list(KINDS)[3]] == pytest.approx(of_one / pictures)


def test_of_the_precise_thresholds_the_highest_that_finds_as_much_is_picked() -> None:
    precision, recall = [0.5, 0.96, 0.9, 0.97, 0.99, 1.0], [0.99, 0.98, 0.97, 0.96, 0.956, 0.7]
    table = pa.table({"threshold": [0.2, 0.3, 0.4, 0.5, 0.6, 0.7], "precision": precision, "recall": recall})
    assert picked(table, 0.95, least=0.2) == 0.6
    assert picked(table, 0.95, least=0.65) == 0.7
    assert picked(table, 0.5, least=0.2) == 0.2
    with pytest.raises(UserError, match=r"at most 0\.97"):
        picked(table.slice(0, 4), 0.98, least=0.2)


def test_thresholds_of_a_cosine_are_those_that_the_pool_asks_for(tmp_path: Path) -> None:
    root = make_pool(tmp_path)
    words = [f"pool={root}/pool", f"holdout={root}/holdout", f"output={root}/out", "calibrate.pictures=5"]
    out = curate(*words, "duplicates.verify=false", "leaks.verify=false", "calibrate.precision=0.9")
    table = parquet.read_table(out / "stages/calibrate/curve.parquet")
    threshold, precision, recall = (table[name].to_numpy() for name in ("threshold", "precision", "recall"))
    rows = parquet.read_table(out / "stages/calibrate/pairs.parquet")
    assert len(set(rows["copy"].to_pylist())) == 5 * len(KINDS)
    assert recall[0] > 0.5
    assert (np.diff(recall) <= 0).all()
    assert (precision[threshold >= _said(out)] >= 0.9).all()
    stored = parquet.read_table(out / "edges/duplicate.parquet")["similarity"].to_numpy()
    assert stored.min() >= min(0.5, _said(out))
    dropped = parquet.read_table(out / "stages/duplicates/dropped.parquet")["similarity"].to_numpy()
    assert len(dropped) >= 5
    again = [path.stat().st_mtime_ns for path in (out / "stages/calibrate/copies").iterdir()]
    curate(*words[:3], "calibrate.pictures=5", "duplicates.verify=false", "leaks.verify=false",
           "calibrate.precision=0.99", "from_stage=calibrate")  # fmt: skip
    assert [path.stat().st_mtime_ns for path in (out / "stages/calibrate/copies").iterdir()] == again


def test_a_picture_that_the_pool_has_turned_counts_neither_way(tmp_path: Path) -> None:
    root = make_pool(tmp_path)
    for number, turn in enumerate(Image.Transpose):
        image = Image.open(root / "pool/class_0" / f"{number % 3:03d}.png")
        image.transpose(turn).save(root / "pool" / f"{turn.name}.png")
    out = curate(f"pool={root}/pool", f"output={root}/out", "calibrate.pictures=40", "stop_after=calibrate")
    rows = parquet.read_table(out / "stages/calibrate/pairs.parquet").to_pylist()
    assert not [row for row in rows if row["unlike"] and row["score"] > 0.9]
    one = [row for row in rows if not row["right"] and row["score"] > 0.9]
    assert len(one) > 40  # copies, and the turned


def _said(out: Path) -> float:
    return read_json(out / "stages/calibrate/picked.json")["duplicates"]


def test_sscds_thresholds_with_another_embedding_are_spoken_of(tmp_path: Path) -> None:
    cosine = DuplicatesConfig(verify=False)
    made = partial(CurateConfig, pool="p", output="o")
    assert borrowed(made()) is None
    line = borrowed(made(duplicates=cosine, leaks=LeaksConfig(verify=False), holdout="h"))
    assert line and "duplicates.threshold=0.6 and leaks.threshold=0.45 belong" in line
    assert borrowed(made(duplicates=cosine, backbone="w/sscd_disc_mixup.torchscript.pt")) is None
    assert borrowed(made(duplicates=DuplicatesConfig(verify=False, threshold=0.3))) is None
    root = make_pool(tmp_path)
    said = run(f"pool={root}/pool", f"output={root}/out", "duplicates.verify=false", "stop_after=ingest")
    assert "belongs to SSCD's embedding" in said.stderr
