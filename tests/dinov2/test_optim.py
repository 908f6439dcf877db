"""Schedules, groups of parameters, clipping, the teacher's average, and checkpoints."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dinov2.checkpoint import Checkpoints
from dinov2.exits import UserError
from dinov2.models.config import vit_config
from dinov2.models.vit import VisionTransformer
from dinov2.optim import (
    OptimConfig,
    Schedules,
    TeacherConfig,
    adamw,
    clip_gradients,
    set_rates,
    update_average,
)


def test_schedules_start_peak_and_end_where_the_recipe_says():
    optim, teacher = OptimConfig(lr=4e-3, warmup=0.1, freeze_last_layer=0.01), TeacherConfig()
    schedules = Schedules(optim=optim, teacher=teacher, steps=1000, batch=2048)
    assert schedules.at(0).lr == 0 and schedules.at(0).momentum == pytest.approx(0.992)
    assert schedules.at(100).lr == pytest.approx(4e-3 * 2**0.5)
    assert schedules.at(50).lr == pytest.approx(schedules.at(100).lr / 2)
    assert schedules.at(1000).lr == pytest.approx(1e-6) and schedules.at(1000).momentum == 1
    assert (schedules.at(0).weight_decay, schedules.at(1000).weight_decay) == pytest.approx((0.04, 0.4))
    assert schedules.at(9).last_layer_lr == 0 and schedules.at(10).last_layer_lr == schedules.at(10).lr > 0
    warm = [schedules.at(step).teacher_temperature for step in (0, 150, 300, 900)]
    assert warm == pytest.approx([0.04, 0.055, 0.07, 0.07])


def test_a_shorter_run_compresses_every_schedule():
    long, short = (
        Schedules(optim=OptimConfig(), teacher=TeacherConfig(), steps=s, batch=64) for s in (1000, 10)
    )
    for tenth in range(11):
        assert vars(long.at(tenth * 100)) == pytest.approx(vars(short.at(tenth)))


def _vit(depth: int = 2) -> VisionTransformer:
    return VisionTransformer(vit_config("vit_tiny", depth=depth, patch=8, image_size=32, registers=1))


def test_layers_have_their_rates_and_vectors_do_not_decay():
    model = _vit()
    config = OptimConfig(layer_decay=0.5, patch_embed_lr=0.2)
    optimizer = adamw(model, config)
    schedules = Schedules(optim=config, teacher=TeacherConfig(), steps=100, batch=1024)
    set_rates(optimizer, schedules.at(10))
    found = {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    by_name = {name: found[id(parameter)] for name, parameter in model.named_parameters()}
    decay = schedules.at(10).weight_decay
    assert by_name["norm.weight"] == pytest.approx((4e-3, 0))
    assert by_name["blocks.1.attn.qkv.weight"] == pytest.approx((4e-3 * 0.5, decay))
    assert by_name["blocks.0.mlp.fc1.bias"] == pytest.approx((4e-3 * 0.25, 0))
    assert by_name["blocks.0.ls1.gamma"] == pytest.approx((4e-3 * 0.25, 0))
    assert by_name["pos_embed"] == pytest.approx((4e-3 * 0.125, decay))
    assert by_name["patch_embed.proj.weight"] == pytest.approx((4e-3 * 0.125 * 0.2, decay))


def test_each_part_is_clipped_by_its_own_norm():
    parts = [nn.Linear(4, 4), nn.Linear(4, 4)]
    for part, scale in zip(parts, (100.0, 0.01), strict=True):
        for parameter in part.parameters():
            parameter.grad = torch.full_like(parameter, scale)
    norms = clip_gradients(parts, 3.0)
    assert [float(norm) for norm in norms] == pytest.approx([100 * 20**0.5, 0.01 * 20**0.5])
    assert [float(norm) for norm in clip_gradients(parts, 0)] == pytest.approx(
        [3.0, 0.01 * 20**0.5], rel=1e-4
    )


def test_the_average_moves_by_the_smallest_steps():
    teacher, student = nn.Linear(3, 3), nn.Linear(3, 3)
    before = teacher.weight.detach().clone()
    update_average(teacher, student, 0.9999)
    expected = 0.9999 * before.double() + 0.0001 * student.weight.double()
    assert not torch.equal(teacher.weight, before)
    torch.testing.assert_close(teacher.weight.double(), expected, rtol=1e-6, atol=1e-8)


def test_checkpoints_are_whole_kept_and_loaded(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2, keep_every=4)
    for step in range(1, 8):
        checkpoints.save(step, {"weight": torch.full((3,), float(step)), "step": step})
    assert checkpoints.steps() == [4, 6, 7]
    state = checkpoints.load(6, {"weight": torch.zeros(3), "step": 0})
    assert state["step"] == 6 and torch.equal(state["weight"], torch.full((3,), 6.0))
    damaged = next((tmp_path / "c" / "00000007").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:20])
    with pytest.raises(UserError, match="cannot be loaded"):
        checkpoints.load(7, {"weight": torch.zeros(3), "step": 0})
    with pytest.raises(UserError, match="cannot be loaded"):
        checkpoints.load(6, {"weight": torch.zeros(5), "step": 0})
