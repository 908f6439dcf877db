"""Rotary positions: float64 rotations, what they depend on, and the box that training draws."""

import math

import torch

from dinov2.models.config import vit_config
from dinov2.models.rope import Turns, angles, draw_box, turn
from tests.dinov2.models.weights import small_vit

CPU = torch.device("cpu")
CONFIG = vit_config("vit_tiny", position="rope", patch=8)
HALF = 32  # pairs of channels in a head of 64


def test_turning_is_multiplying_complex_numbers() -> None:
    x = torch.randn(5, 3, 64, dtype=torch.float64)
    angle = 9 * torch.rand(5, HALF, dtype=torch.float64)
    pairs = torch.complex(x[..., :HALF], x[..., HALF:]) * torch.exp(1j * angle)[:, None]
    turned = turn(x, Turns(angle.cos(), angle.sin()))
    assert torch.allclose(turned, torch.cat([pairs.real, pairs.imag], dim=-1))
    assert turn(x.bfloat16(), Turns(angle.cos(), angle.sin())).dtype == torch.bfloat16


def test_angles_follow_the_places_of_patch_centres() -> None:
    found = angles((2, 4), CONFIG, CPU).double()
    for row in range(2):
        for column in range(4):
            for pair in range(HALF // 2):
                period = 100 ** (pair / (HALF // 2))
                up, right = 2 * (row + 0.5) / 2 - 1, 2 * (column + 0.5) / 4 - 1
                patch = found[4 * row + column]
                assert math.isclose(patch[pair], 2 * math.pi * up / period, abs_tol=1e-5)
                assert math.isclose(patch[HALF // 2 + pair], 2 * math.pi * right / period, abs_tol=1e-5)


def test_a_finer_grid_lies_between_the_places_of_a_coarse_one() -> None:
    """Any size is interpolated: the mean angle of four small patches is that of the large one."""
    fine = angles((8, 8), CONFIG, CPU).view(4, 2, 4, 2, HALF).mean(dim=(1, 3)).flatten(0, 1)
    assert torch.allclose(fine, angles((4, 4), CONFIG, CPU), atol=1e-5)


def test_the_box_stays_within_its_limits_and_follows_the_generator() -> None:
    config = vit_config("vit_tiny", position="rope", rope_shift=0.1, rope_jitter=1.2, rope_rescale=2.0)
    boxes = torch.stack([draw_box(config, CPU, torch.Generator().manual_seed(seed)) for seed in range(500)])
    shift, scale = boxes[:, 0], boxes[:, 1]
    assert 0.09 < shift.abs().max() <= 0.1
    ratio = scale[:, 0] / scale[:, 1]
    assert 1.2 < ratio.max() <= 1.2**2 and 1 / 1.2**2 <= ratio.min() < 1 / 1.2
    assert 2 < scale.max() <= 2 * 1.2 and 1 / (2 * 1.2) <= scale.min() < 0.5
    assert torch.equal(boxes[7], draw_box(config, CPU, torch.Generator().manual_seed(7)))


def test_only_training_moves_the_box_and_one_draw_serves_all_crops() -> None:
    vit = small_vit(position="rope", rope_rescale=2.0)
    big, small = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 32, 32)

    def cls(crops: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
        with torch.no_grad():
            features = vit.forward_packed(crops, None, torch.Generator().manual_seed(seed))
        return [group["x_norm_clstoken"] for group in features]

    assert torch.equal(cls([big], 0)[0], cls([big], 1)[0])
    vit.train()
    assert not torch.allclose(cls([big], 0)[0], cls([big], 1)[0], atol=1e-3)
    assert all(
        torch.allclose(a, b, atol=1e-5)
        for a, b in zip(cls([big, small], 3), cls([big], 3) + cls([small], 3), strict=True)
    )
    assert not vit.config.still().draws_box


def test_stochastic_depth_turns_the_crops_that_are_left() -> None:
    """Against the full branch: a crop that is kept in a batch of equal ones has the full update, scaled."""
    vit = small_vit(position="rope", drop_path=0.5, depth=1).train()
    images = torch.randn(1, 3, 64, 64).expand(4, -1, -1, -1)
    with torch.no_grad():
        dropped = vit.forward_packed([images], None, torch.Generator().manual_seed(0))[0]["x_prenorm"]
        plain = small_vit(position="rope", depth=1)
        packed, groups = plain._pack([images], [None])
        block, turns = plain.blocks[0], plain._turns([images], CPU)
        update = block.ls1(block.attn(block.norm1(packed), groups, "sdpa", turns))  # pyright: ignore[reportCallIssue]
        candidates = []
        for scale in (0.0, 2.0):
            attended = packed + scale * update
            fed = block.ls2(block.mlp(block.norm2(attended)))  # pyright: ignore[reportCallIssue]
            candidates += [attended, attended + 2.0 * fed]
    for crop in range(4):
        expected = [c.view_as(dropped)[crop] for c in candidates]
        assert min(float((dropped[crop] - one).abs().max()) for one in expected) < 1e-4
