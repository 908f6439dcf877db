"""The figures of health equal their definitions, and tell a collapsed backbone from one that is not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from dinov2.checkpoint import Checkpoints
from dinov2.export import save_backbone
from dinov2.models import load_backbone
from dinov2.models.heads import DINOHead
from dinov2.models.vit import VisionTransformer
from evals.health import Norms, uniformity
from tests.evals.small import result_of, small_backbone
from tests.pictures import class_folder

SMALL = ["size=32", "batch=16"]


def test_the_figures_are_their_definitions(tmp_path):
    backbone = small_backbone(tmp_path)
    class_folder(tmp_path / "pictures", classes=3, each=8)
    found = result_of(
        backbone, "health", *SMALL, f"data={tmp_path / 'pictures'}", "token=cls", output=tmp_path / "out"
    )
    (path,) = [
        path for path in (tmp_path / "out").glob("features/*/cls/00000.npy") if "Random" not in meta(path)
    ]
    rows = np.load(path).astype(np.float64)
    values = np.linalg.svd(rows, compute_uv=False)
    shares = values / values.sum() + 1e-7
    assert found["metrics"]["rankme"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-3)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    squared = ((unit[:, None] - unit[None]) ** 2).sum(2)
    pairs = ~np.eye(24, dtype=bool)
    assert found["metrics"]["uniformity"] == pytest.approx(
        np.log(np.exp(-2 * squared[pairs]).mean()), rel=1e-3
    )
    kernel, counts = np.exp(-2 * squared), np.random.default_rng(0).integers(0, 3, 24)
    drawn = np.repeat(np.arange(24), counts)
    other = drawn[:, None] != drawn[None]  # a picture drawn twice is no pair
    assert uniformity(kernel, counts) == pytest.approx(np.log(kernel[np.ix_(drawn, drawn)][other].mean()))
    views = [
        np.load(path).astype(np.float64)
        for path in (tmp_path / "out").glob("features/*/cls/00000.npy")
        if "Random" in meta(path)
    ]
    first, second = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in views)
    assert found["metrics"]["alignment"] == pytest.approx(((first - second) ** 2).sum(1).mean(), rel=1e-3)
    low, high = found["intervals"]["alignment"]
    assert low < found["metrics"]["alignment"] < high
    assert found["lower_is_better"] == ["alignment", "outliers", "uniformity"]
    assert "prototypes" not in found["metrics"]


def meta(path: Path) -> str:
    return (path.parent / "meta.json").read_text()


def test_a_collapsed_backbone_is_told_from_one_that_is_not(tmp_path):
    class_folder(tmp_path / "pictures", classes=3, each=8)
    words = [*SMALL, f"data={tmp_path / 'pictures'}"]
    good = result_of(small_backbone(tmp_path), "health", *words, output=tmp_path / "good")
    vit = load_backbone(str(tmp_path / "backbone"))
    assert isinstance(vit, VisionTransformer)
    nn.init.constant_(vit.norm.weight, 1e-3)  # what is left is the bias, the same for every picture
    nn.init.constant_(vit.norm.bias, 1.0)
    mean, std = vit.normalisation
    save_backbone(vit, None, tmp_path / "collapsed", mean=mean, std=std, card={})
    bad = result_of(str(tmp_path / "collapsed"), "health", *words, output=tmp_path / "bad")
    assert bad["metrics"]["rankme"] < 1.2 < 5 < good["metrics"]["rankme"]
    assert bad["metrics"]["uniformity"] > -0.01 > good["metrics"]["uniformity"]
    assert bad["metrics"]["alignment"] < 0.01 * good["metrics"]["alignment"]


def test_outliers_are_tokens_far_above_the_median():
    maps = [torch.ones(4, 4), torch.ones(4, 4)]
    maps[1][0, :2] = torch.tensor([3.5, 2.9])
    norms = Norms(maps, [0, 1])
    assert norms.outliers.tolist() == [0, 1 / 16]


def test_prototypes_of_a_run_are_those_of_its_teacher(tmp_path):
    class_folder(tmp_path / "pictures", classes=3, each=8)
    run = tmp_path / "run"
    backbone = small_backbone(run)
    sizes: dict[str, Any] = {"hidden": 32, "bottleneck": 16, "prototypes": 20}
    (run / "config.yaml").write_text(yaml.safe_dump({"heads": {"dino": sizes}}))
    head = DINOHead(48, **sizes)
    with Checkpoints(run / "checkpoints") as checkpoints:
        checkpoints.save(7, {"teacher": {f"dino_head.{name}": x for name, x in head.state_dict().items()}})
    found = result_of(backbone, "health", *SMALL, f"data={tmp_path / 'pictures'}", output=tmp_path / "out")
    (path,) = [
        path for path in (tmp_path / "out").glob("features/*/cls/00000.npy") if "Random" not in meta(path)
    ]
    with torch.no_grad():
        assigned = (head(torch.from_numpy(np.load(path)).float()).double() / 0.1).softmax(1).mean(0)
    expected = float(torch.exp(-(assigned * assigned.log()).sum())) / 20
    assert found["metrics"]["prototypes"] == pytest.approx(100 * expected, rel=1e-4)
    assert 1 <= found["details"]["prototypes that some picture chooses"] <= 20
