"""Stochastic depth: right in expectation, exact for each draw, and saving what it drops."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dinov2.models.blocks import Subset, add_branch, draw_depth, kept_crops
from dinov2.models.vit import VisionTransformer
from tests.dinov2.models.weights import small_vit

GROUPS = ((4, 5), (7, 3))
CPU = torch.device("cpu")


def branch(x: torch.Tensor, groups: object) -> torch.Tensor:
    return x.sin()


def masked_form(x: torch.Tensor, subset: Subset | None, gamma: torch.Tensor) -> torch.Tensor:
    """Everything computed, then multiplied by 0 or the scale: the plain meaning of the subset form."""
    factor = torch.ones(len(x), 1, dtype=x.dtype) * (subset is None)
    if subset is not None:
        for tokens, scale in zip(subset.tokens, subset.scales, strict=True):
            factor[tokens] = scale
    return x + factor * gamma * branch(x, None)


def test_each_draw_equals_the_masked_form_in_value_and_gradient() -> None:
    x = torch.randn(41, 6, dtype=torch.float64, requires_grad=True)
    gamma = torch.randn(6, dtype=torch.float64, requires_grad=True)
    drawn = draw_depth(GROUPS, 0.4, 3, CPU, torch.Generator().manual_seed(0))
    for subset in (None, *(subset for keep in drawn for subset in keep)):
        plain, ours = masked_form(x, subset, gamma), add_branch(x, branch, GROUPS, subset, gamma)
        assert torch.allclose(ours, plain)
        mine, theirs = (torch.autograd.grad(y.pow(2).sum(), (x, gamma)) for y in (ours, plain))
        assert all(map(torch.allclose, mine, theirs))
        one, none = (add_branch(x, branch, GROUPS, subset, scale) for scale in (torch.ones_like(gamma), None))
        assert torch.equal(one, none)


def test_the_mean_over_draws_is_the_full_branch() -> None:
    x = torch.randn(41, 2, dtype=torch.float64)
    keeps = draw_depth(GROUPS, 0.4, 4000, CPU, torch.Generator().manual_seed(0))
    draws = torch.stack([add_branch(x, branch, GROUPS, subset) for keep in keeps for subset in keep])
    full = add_branch(x, branch, GROUPS, None)
    error = draws.std(dim=0) / len(draws) ** 0.5
    assert ((draws.mean(dim=0) - full).abs() < 5 * error).all()


@pytest.mark.parametrize(("count", "rate", "kept"), [(1, 0.9, 1), (8, 0.3, 6), (10, 0.35, 6), (64, 0.3, 45)])
def test_how_many_crops_are_kept(count: int, rate: float, kept: int) -> None:
    assert kept_crops(count, rate) == kept


def test_whole_crops_are_drawn_for_each_branch_by_itself_and_reproducibly() -> None:
    state = torch.get_rng_state()
    first, again = (draw_depth(GROUPS, 0.5, 8, CPU, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())  # the global state is nobody's to move
    subsets = [subset for keep in first for subset in keep if subset]
    for subset in subsets:
        for (kept, length), tokens, start in zip(subset.groups, subset.tokens, (0, 20), strict=True):
            crops = (tokens.view(kept, length) - start) // length
            assert (crops == crops[:, :1]).all()
            assert len(set(crops[:, 0].tolist())) == kept
    assert len({tuple(torch.cat(subset.tokens).tolist()) for subset in subsets}) > 8
    flat = [
        [torch.cat(subset.tokens) for keep in draw for subset in keep if subset] for draw in (first, again)
    ]
    assert all(map(torch.equal, *flat))


def test_dropped_crops_cost_nothing() -> None:
    crops = [torch.randn(10, 3, 64, 64), torch.randn(20, 3, 32, 32)]
    flops = {}
    for rate in (0.0, 0.3, 0.6):
        vit = small_vit(drop_path=rate, depth=6).train()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vit.forward_packed(crops, None, torch.Generator().manual_seed(0))
        everything = counter.get_flop_counts()["Global"]
        flops[rate] = sum(everything.values())
    stem = 2 * (10 * 64 + 20 * 16) * 192 * 192
    for rate in (0.3, 0.6):
        assert (flops[rate] - stem) / (flops[0.0] - stem) == pytest.approx(1 - rate, rel=1e-6)


def test_nothing_is_dropped_in_evaluation() -> None:
    images = torch.randn(8, 3, 64, 64)
    vit = small_vit(drop_path=0.5)
    with torch.no_grad():
        assert torch.equal(vit(images), small_vit()(images))
        assert not torch.allclose(vit.train()(images), small_vit()(images))


def test_compiled_and_checkpointed_blocks_draw_the_same() -> None:
    """Compilation (here without code generation) of each block meets no graph break and no second shape."""
    crops = [torch.randn(4, 3, 64, 64), torch.randn(8, 3, 32, 32)]

    def gradients(vit: VisionTransformer, seed: int) -> list[torch.Tensor]:
        vit.zero_grad()
        outputs = vit.forward_packed(crops, None, torch.Generator().manual_seed(seed))
        torch.stack([group["x_norm_clstoken"].pow(2).sin().sum() for group in outputs]).sum().backward()
        return [parameter.grad for parameter in vit.parameters() if parameter.grad is not None]

    plain = small_vit(drop_path=0.5).train()
    compiled, checkpointed = copy.deepcopy(plain), copy.deepcopy(plain)
    for block in compiled.blocks:
        block.compile(backend="eager", fullgraph=True, dynamic=False)
    for block in checkpointed.blocks:
        forward = block.forward
        block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
    gradients(compiled, 0)
    with torch.compiler.set_stance("fail_on_recompile"):
        ours = gradients(compiled, 1)
    expected = gradients(plain, 1)
    for mine, recomputed, theirs in zip(ours, gradients(checkpointed, 1), expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)
        assert torch.equal(recomputed, theirs)
