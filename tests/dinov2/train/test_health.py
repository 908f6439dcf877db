"""Figures of health against plain references; collapses that are made on purpose are named, in real runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dinov2.config import read
from dinov2.models.config import vit_config
from dinov2.models.vit import VisionTransformer
from dinov2.ssl.figures import figures
from dinov2.train.config import TrainConfig
from dinov2.train.cost import head_flops, vit_flops, work_of
from dinov2.train.health import spread
from tests.dinov2.train.runs import finish, train_words

LEARNS = """steps=45 batch=16 workers=0 model.drop_path=0 model.layer_scale=0.1 losses.ibot=0
heads.separate=false optim.lr=6e-3 optim.layer_decay=1 optim.patch_embed_lr=1 teacher.momentum=0.98
teacher.temperature_warmup=1 watch.every=20 checkpoint.every=1000"""
CENTERED = ["teacher.targets=centering", "losses.koleo=0"]


@pytest.mark.parametrize(
    ("words", "kind", "cause"),
    [
        ([], None, ""),
        ([*CENTERED, "teacher.center_momentum=1"], "one prototype", "not centred"),
        ([*CENTERED, "teacher.temperature=1", "teacher.temperature_start=1"], "uniform", "not sharp"),
    ],
    ids=["healthy", "no centering", "no sharpening"],
)
def test_a_collapse_is_named_by_its_kind_and_a_healthy_run_is_not_warned(
    pictures: Path, tmp_path: Path, words: list[str], kind: str | None, cause: str
):
    done = finish(train_words(pictures, *LEARNS.split(), *words), tmp_path)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "run" / "warnings.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert [warning["kind"] for warning in found] == ([kind] if kind else [])
    if kind:
        assert f"a collapse in the making, {kind}" in done.stderr and cause in done.stderr
    report = (tmp_path / "run" / "report.html").read_text()
    assert ("What went wrong" in report) == bool(kind)
    assert "kWh" in report and "after steps 0, 6, 13, 19, 26, 32, 39, 45" in report
    assert len(list((tmp_path / "run" / "snapshots").glob("*/*-attention.png"))) == 8 * 4


def test_what_tells_crops_apart_is_the_mutual_information_of_crop_and_prototype():
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(12, 30, generator=draw)
    targets = torch.softmax(torch.randn(12, 30, generator=draw) * 3, dim=1)
    pairs = zip(targets.split(5), scores.split(5), strict=True)
    found = figures(pairs, torch.randn(12, 8, generator=draw))
    for name, rows in (("teacher", targets), ("student", torch.softmax(scores.double() / 0.1, dim=1))):
        joint = rows.double().numpy() / 12
        independent = joint.sum(0, keepdims=True) * joint.sum(1, keepdims=True)
        assert found[f"told_apart.{name}"] == pytest.approx(
            (joint * np.log(joint / independent)).sum(), rel=1e-4
        )
        assert found[f"entropy.{name}"] == pytest.approx(
            -(joint * 12 * np.log(joint * 12)).sum() / 12, rel=1e-4
        )


def test_rank_and_nearest_neighbour_are_those_of_numpy_and_scikit_learn():
    draw = np.random.default_rng(0)
    views = draw.normal(size=(20, 3)) @ draw.normal(size=(3, 16))  # of rank 3
    found = spread(torch.tensor(views, dtype=torch.float32))
    values = np.linalg.svd(views, compute_uv=False)
    shares = values[values > 1e-9] / values.sum()
    assert found["features.rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-3)
    unit = views / np.linalg.norm(views, axis=1, keepdims=True)
    distances = NearestNeighbors(n_neighbors=2).fit(unit).kneighbors(unit)[0][:, 1]
    assert found["features.nearest"] == pytest.approx(distances.mean(), rel=1e-3)


def _attention(inputs, outputs) -> int:  # type: ignore[no-untyped-def]  # fvcore's protocol: values of the graph
    """Multiply-adds of what fvcore has no counter for: q @ k and weights @ v."""
    batch, heads, tokens, width = inputs[0].type().sizes()
    return 2 * batch * heads * tokens * tokens * width


class _OneBlock(nn.Module):
    """A block over one crop, without the shapes that fvcore's tracer cannot follow."""

    def __init__(self, block: nn.Module, tokens: int) -> None:
        super().__init__()
        self.block, self.groups = block, ((1, tokens),)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x, self.groups)


@pytest.mark.parametrize("over", [{}, {"ffn": "swiglu", "registers": 4}], ids=["mlp", "swiglu"])
def test_the_closed_formula_of_operations_is_what_fvcore_counts(over: dict[str, Any]):
    config = vit_config("vit_tiny", depth=3, patch=8, image_size=64, **over)
    backbone = VisionTransformer(config).eval()
    tokens = 1 + config.registers + 64
    count = FlopCountAnalysis(_OneBlock(backbone.blocks[0], tokens), torch.zeros(tokens, 192))
    count.set_op_handle("aten::scaled_dot_product_attention", _attention)
    count.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    embedding = 2 * 64 * 192 * 3 * 8**2
    assert vit_flops(config, 64) == pytest.approx(3 * 2 * count.total() + embedding, rel=0.02)


def test_tokens_that_no_loss_looks_at_are_not_counted_in_the_last_block():
    config = vit_config("vit_tiny", depth=3, patch=8, image_size=64)
    backbone, images = VisionTransformer(config).eval(), [torch.zeros(1, 3, 64, 64)]
    counted = []
    for looked_at in (None, torch.arange(0, 64, 8)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            backbone.forward_packed(images, [None], looked_at=looked_at)
        counted.append(counter.get_total_flops())
    saved = vit_flops(config, 64) - vit_flops(config, 64, finished=1 + 8)
    assert counted[0] - counted[1] == pytest.approx(saved, rel=1e-6)


def test_a_steps_work_counts_every_crop_thrice_and_the_teachers_once():
    config = read(
        TrainConfig,
        ["data=x", "output=y", "steps=1", "model.drop_path=0", "losses.ibot=0", "model.size=vit_tiny"],
    )
    vit, work = vit_config("vit_tiny"), work_of(config)
    assert work is not None
    head = head_flops(config.heads.dino, 192)
    locals_ = config.augment.local_crops
    sides = 224, config.augment.local_size
    large, small = (vit_flops(vit, side, finished=1) + head for side in sides)
    assert work.flops == pytest.approx(2 * large + 3 * (2 * large + locals_ * small))
    assert work.tokens == 2 * 257 + locals_ * (1 + (config.augment.local_size // 14) ** 2)
