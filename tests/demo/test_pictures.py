"""The demo's pictures keep the rules that its page states: checked by painting the windows."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError
from pyarrow import parquet
from scipy import ndimage, sparse

from demo.config import Plan
from demo.geometry import Window, overlap
from demo.photographs import photographs, wanted_photographs
from demo.pictures import make_pictures
from demo.windows import GAP, cut, place

FINE = 2  # painted points per pixel, along each side
SMALL = Plan(most_training=12, most_test=4, copies=12, corrupt=9, drawings=4)


def painted(window: Window, size: tuple[int, int]) -> sparse.csr_array:
    """The points of the photograph that the window covers, as a row."""
    reach = np.ceil(window.side)
    columns = np.arange(max(0, (window.x - reach) * FINE // 1), min(size[0], window.x + reach) * FINE // 1)
    rows = np.arange(max(0, (window.y - reach) * FINE // 1), min(size[1], window.y + reach) * FINE // 1)
    x, y = (columns[None, :] + 0.5) / FINE - window.x, (rows[:, None] + 0.5) / FINE - window.y
    cos, sin = np.cos(np.radians(window.angle)), np.sin(np.radians(window.angle))
    inside = np.maximum(np.abs(x * cos + y * sin), np.abs(y * cos - x * sin)) <= window.side / 2
    points = (rows[:, None] * size[0] * FINE + columns[None, :])[inside].astype(np.int64)
    ones = np.ones(len(points), np.int32)
    return sparse.csr_array((ones, (np.zeros_like(points), points)), shape=(1, size[0] * size[1] * FINE**2))


def shares(windows: list[Window], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """What part of the smaller one each two windows share, and how often each point is covered."""
    rows = sparse.vstack([painted(window, size) for window in windows]).tocsr()
    areas, sides = rows.sum(1), np.array([window.side for window in windows])
    assert areas == pytest.approx((sides * FINE) ** 2, rel=0.04)  # all of it inside the photograph
    shared = (rows @ rows.T).toarray() / np.minimum(areas[:, None], areas[None, :])
    np.fill_diagonal(shared, 0)
    return shared, rows.sum(0).reshape(size[1] * FINE, size[0] * FINE)


def test_overlap_is_what_painting_finds():
    rng = random.Random(5)
    for _ in range(60):
        pair = [
            Window(rng.uniform(70, 130), rng.uniform(70, 130), rng.uniform(30, 90), rng.uniform(-180, 180))
            for _ in range(2)
        ]
        assert overlap(*pair) == pytest.approx(shares(pair, (200, 200))[0].max(), abs=0.01)
    assert overlap(Window(50, 50, 40, 10), Window(50, 50, 40, 10)) == pytest.approx(1)
    assert overlap(Window(50, 50, 40, 0), Window(52, 49, 20, 30)) == pytest.approx(1)


def test_a_window_shows_its_place():
    y, x = np.mgrid[:120, :120].astype(np.uint8)
    seen = pixels_of(cut(Image.fromarray(np.stack([x, y, x], -1)), Window(60, 50, 40, 30), 40))
    turn = np.radians(30)
    for column, row in ((2, 2), (20, 20), (37, 5)):
        u, v = column + 0.5 - 20, row + 0.5 - 20
        there = [60 + u * np.cos(turn) - v * np.sin(turn), 50 + u * np.sin(turn) + v * np.cos(turn)]
        assert [float(level) + 0.5 for level in seen[row, column][:2]] == pytest.approx(there, abs=1)


def test_originals_overlap_by_at_most_a_tenth_and_test_regions_are_apart():
    rng = random.Random(1)
    for label, photograph in wanted_photographs().items():
        placed = place(photograph, rng, most_training=Plan.most_training, most_test=Plan.most_test)
        covered = {}
        for name, windows in (("training", placed.training), ("test", placed.test)):
            assert len(windows) >= 4, label
            shared, covered[name] = shares(windows, photograph.size)
            assert shared.max() <= 0.1, f"{label}: {name} windows overlap"
        distance = np.asarray(ndimage.distance_transform_edt(covered["test"] == 0))
        assert distance[covered["training"] > 0].min() >= (GAP - 1) * FINE, f"{label}: regions touch"


def truth_of(folder: Path) -> dict[str, dict]:
    return {row["path"]: row for row in parquet.read_table(folder / "truth.parquet").to_pylist()}


def pixels(path: Path) -> np.ndarray:
    return pixels_of(Image.open(path))


def pixels_of(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))


def test_truth_is_true(tmp_path: Path):
    make_pictures(tmp_path / "a", 3, SMALL)
    make_pictures(tmp_path / "b", 3, SMALL)
    make_pictures(tmp_path / "c", 4, SMALL)
    truth = truth_of(tmp_path / "a")
    files = {str(path.relative_to(tmp_path / "a")): path for path in (tmp_path / "a").rglob("*.*")}
    assert set(truth) == set(files) - {"truth.parquet", "made_by.json"}
    for name, path in files.items():
        assert path.read_bytes() == (tmp_path / "b" / name).read_bytes()  # a function of the seed
    assert set(truth) != set(truth_of(tmp_path / "c"))
    for name, row in truth.items():
        copy_of: dict | None = truth[row["of"]] if row["of"] else None
        assert name.split("/")[1] == row["label"]
        assert (copy_of is None) == (row["kind"] in ("original", "drawing"))
        if row["kind"] == "corrupt":
            with pytest.raises((UnidentifiedImageError, OSError)):
                pixels(files[name])
            continue
        seen = pixels(files[name])
        if copy_of:
            assert copy_of["kind"] == "original"
            assert copy_of["path"].startswith("test/" if row["kind"] == "leaked" else "pool/")
        if row["kind"] == "exact":
            assert (seen == pixels(files[row["of"]])).all()
        if row["kind"] == "re-encoded":
            assert seen.shape == pixels(files[row["of"]]).shape
            assert (seen != pixels(files[row["of"]])).any()
    assert {row["kind"] for row in truth.values()} >= {
        "cropped",
        "recoloured",
        "resized",
        "leaked",
        "drawing",
    }


def test_each_wanted_photograph_has_seeds_pool_and_test(tmp_path: Path):
    make_pictures(tmp_path / "a", 0, SMALL)
    for label in photographs(
        {"cat": "skimage/data/chelsea.png", "pagoda": "sklearn/datasets/images/china.jpg"}
    ):
        for folder in ("pool", "seeds", "test"):
            assert any((tmp_path / "a" / folder / label).iterdir())


def test_broken_files_are_of_three_kinds():
    from demo.planted import corrupt

    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(picture, "JPEG")
    edits = {corrupt(picture.getvalue(), "jpg", random.Random(seed))[2].split(" ")[0] for seed in range(40)}
    assert edits == {"cut", "text", "empty"}
