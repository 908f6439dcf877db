"""Schedules, groups of parameters, clipping, the teacher's average, and checkpoints."""

import pytest
import torch
from torch import nn

from dinov2.models.config import vit_config
from dinov2.models.vit import VisionTransformer
from dinov2.optim import (
    OptimConfig,
    Schedules,
    TeacherConfig,
    clip_gradients,
    make_optimizer,
    set_rates,
    update_average,
)
from dinov2.parallel import rank, shard
from tests.ranks import on_ranks


def test_schedules_start_peak_and_end_where_the_recipe_says():
    optim, teacher = OptimConfig(lr=4e-3, warmup=0.1, freeze_last_layer=0.01), TeacherConfig()
    schedules = Schedules(optim=optim, teacher=teacher, steps=1000, batch=2048, pictures=2048)
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
        Schedules(optim=OptimConfig(), teacher=TeacherConfig(), steps=s, batch=64, pictures=64)
        for s in (1000, 10)
    )
    for tenth in range(11):
        assert vars(long.at(tenth * 100)) == pytest.approx(vars(short.at(tenth)))


def test_constant_schedules_stay_after_the_warmup():
    optim, teacher = OptimConfig(schedule="constant", lr_scaling="none", warmup=0.1), TeacherConfig()
    schedules = Schedules(optim=optim, teacher=teacher, steps=100, batch=64, pictures=64)
    assert schedules.at(5).lr == pytest.approx(optim.lr / 2)
    for step in (10, 50, 99):
        at = schedules.at(step)
        assert (at.lr, at.weight_decay, at.momentum) == (optim.lr, optim.weight_decay, teacher.momentum)


def test_a_frozen_backbone_warms_up_when_it_thaws():
    optim = OptimConfig(lr_scaling="none", warmup=0.1, freeze_backbone=0.2)
    schedules = Schedules(optim=optim, teacher=TeacherConfig(), steps=100, batch=64, pictures=64)
    rates = [schedules.at(step) for step in range(100)]
    assert all(rate.backbone_lr == 0 for rate in rates[:21]) and rates[20].lr > 3.5e-3
    assert rates[25].backbone_lr == pytest.approx(rates[25].lr / 2)
    assert all(rate.backbone_lr == pytest.approx(rate.lr) for rate in rates[30:])


def test_teachers_of_other_kinds_are_the_students_that_they_are_named_after():
    """The student counts its steps; what the teacher holds while a step is computed says whose copy it is."""
    found = {}
    for kind in ("student_copy", "previous_iteration", "previous_epoch"):
        teacher, student = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        for module in (teacher, student):
            nn.init.zeros_(module.weight)
        # 2.5 steps an epoch: the first one ends within step 2, the second with step 4
        schedules = Schedules(
            optim=OptimConfig(), teacher=TeacherConfig(update=kind), steps=10, batch=4, pictures=10
        )
        found[kind] = []
        for step in range(7):
            found[kind].append(teacher.weight.item())
            rates = schedules.at(step)
            update_average(teacher, student, rates.momentum_before)
            nn.init.constant_(student.weight, step + 1)
            update_average(teacher, student, rates.momentum)
    assert found["student_copy"] == [0, 1, 2, 3, 4, 5, 6]
    assert found["previous_iteration"] == [0, 0, 1, 2, 3, 4, 5]
    assert found["previous_epoch"] == [0, 0, 0, 3, 3, 5, 5]


def _vit(depth: int = 2) -> VisionTransformer:
    return VisionTransformer(vit_config("vit_tiny", depth=depth, patch=8, image_size=32, registers=1))


def test_layers_have_their_rates_and_vectors_do_not_decay():
    model = _vit()
    config = OptimConfig(layer_decay=0.5, patch_embed_lr=0.2)
    optimizer = make_optimizer(model, config)
    schedules = Schedules(optim=config, teacher=TeacherConfig(), steps=100, batch=1024, pictures=1024)
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


def test_each_parameter_is_clipped_by_its_own_norm_as_in_dino():
    part = nn.Linear(4, 4)
    part.weight.grad, part.bias.grad = torch.full((4, 4), 100.0), torch.full((4,), 0.01)
    assert float(clip_gradients([part], 3.0, "parameter")[0]) == pytest.approx((400**2 + 0.02**2) ** 0.5)
    assert float(part.weight.grad.norm()) == pytest.approx(3.0, rel=1e-4)
    assert float(part.bias.grad.norm()) == pytest.approx(0.02)


def _sharded_norms() -> tuple[list[float], float]:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    shard(model, model, torch.device("cpu"), prepare=lambda part: None)
    ((rank() + 1.0) * model(torch.ones(2, 3)).sum()).backward()  # averaged: 1.5 times
    norms = [float(norm) for norm in clip_gradients([model], 0.5, "parameter")]
    return norms, float(clip_gradients([model], 0)[0])


def test_sharded_gradients_are_clipped_as_whole_ones():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    (1.5 * model(torch.ones(2, 3)).sum()).backward()
    norms = [float(norm) for norm in clip_gradients([model], 0.5, "parameter")]
    after = float(clip_gradients([model], 0)[0])
    for found, clipped in on_ranks(2, _sharded_norms):
        assert found == pytest.approx(norms) and clipped == pytest.approx(after)


def test_sgd_is_the_textbook_s():
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    config = OptimConfig(name="sgd", lr=0.1, warmup=0, weight_decay=0.5, weight_decay_end=0.5)
    optimizer = make_optimizer(model, config)
    set_rates(
        optimizer, Schedules(optim=config, teacher=TeacherConfig(), steps=1, batch=1024, pictures=9).at(0)
    )
    model.weight.grad, model.bias.grad = torch.ones(2, 2), torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(model.weight, before - 0.1 * (1 + 0.5 * before))


def test_the_average_moves_by_the_smallest_steps():
    teacher, student = nn.Linear(3, 3), nn.Linear(3, 3)
    before = teacher.weight.detach().clone()
    update_average(teacher, student, 0.9999)
    expected = 0.9999 * before.double() + 0.0001 * student.weight.double()
    assert not torch.equal(teacher.weight, before)
    torch.testing.assert_close(teacher.weight.double(), expected, rtol=1e-6, atol=1e-8)
