"""Each loss against a plain float64 reference, values and gradients, on one process and on several ranks."""

import math

import pytest
import torch
from torch import Tensor

from dinov2.losses.cross_entropy import dino, ibot
from dinov2.losses.koleo import koleo
from dinov2.losses.targets import centered, next_center, sinkhorn
from dinov2.parallel import rank, world
from tests.ranks import on_ranks

BATCH, LOCALS, K = 4, 3, 16


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_sinkhorn(scores: Tensor, temperature: float) -> Tensor:
    """SwAV's algorithm 1 as printed, in float64."""
    q = torch.exp(scores.double() / temperature).T
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(dim=1, keepdim=True) / q.shape[0]
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def plain_dino(student: Tensor, teacher: Tensor) -> Tensor:
    """DINO's algorithm 1: a loop over pairs of crops of the same image."""
    total, terms = torch.zeros((), dtype=torch.float64), 0
    for view, target in enumerate(teacher.chunk(2)):
        for crop, scores in enumerate(student.chunk(LOCALS + 2)):
            if crop != view:
                total = total - (target * torch.log_softmax(scores / 0.1, dim=1)).sum(dim=1).mean()
                terms += 1
    assert terms == 2 * LOCALS + 2
    return total / terms


def plain_ibot(student: Tensor, teacher: Tensor, crop: Tensor, crops: int) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for index in range(crops):
        own = crop == index
        if own.any():
            total = total - (teacher[own] * torch.log_softmax(student[own] / 0.1, dim=1)).sum(dim=1).mean()
    return total / crops


def plain_koleo(cls: Tensor) -> Tensor:
    unit = cls / cls.norm(dim=1, keepdim=True)
    distance = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance + 10 * torch.eye(len(unit), dtype=unit.dtype)
    return -torch.log(distance.min(dim=1).values + 1e-8).mean()


def _same(ours: Tensor, plain: Tensor, inputs: Tensor, reference: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours.double(), plain, rtol=tolerance, atol=tolerance)
    ours.backward()
    plain.backward()
    assert inputs.grad is not None and reference.grad is not None
    torch.testing.assert_close(inputs.grad.double(), reference.grad, rtol=1e-4, atol=tolerance)


def _pair(*shape: int, seed: int) -> tuple[Tensor, Tensor]:
    values = _randn(*shape, seed=seed)
    return values.requires_grad_(), values.detach().double().requires_grad_()


def test_sinkhorn_equals_the_printed_algorithm():
    scores = _randn(8, K)
    torch.testing.assert_close(
        sinkhorn(scores, 0.07).double(), plain_sinkhorn(scores, 0.07), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("scale", [1.5, 1e3, 1e6])
def test_sinkhorn_is_finite_for_logits_of_any_size(scale: float):
    targets = sinkhorn(scale * _randn(64, 4096), 0.04)
    assert torch.isfinite(targets).all()
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(64))


def test_sinkhorn_spreads_what_a_plain_softmax_gives_to_one_prototype():
    scores = _randn(32, 8) + torch.tensor([5.0] + [0.0] * 7)
    shares = sinkhorn(scores, 0.5, rounds=50).sum(dim=0)
    torch.testing.assert_close(shares, torch.full((8,), 4.0), rtol=1e-3, atol=1e-3)


def test_centering_equals_the_formula_and_leaves_its_inputs():
    scores, center = _randn(8, K), _randn(K, seed=1)
    before = scores.clone(), center.clone()
    reference = torch.softmax((scores.double() - center.double()) / 0.04, dim=1)
    torch.testing.assert_close(centered(scores, center, 0.04).double(), reference, rtol=1e-4, atol=1e-6)
    expected = 0.9 * center + 0.1 * scores.mean(dim=0)
    torch.testing.assert_close(next_center(center, scores, 0.9), expected)
    assert torch.equal(scores, before[0]) and torch.equal(center, before[1])


def test_dino_equals_a_loop_over_pairs_of_crops():
    student, reference = _pair((LOCALS + 2) * BATCH, K, seed=0)
    teacher = torch.softmax(_randn(2 * BATCH, K, seed=1) / 0.04, dim=1)
    _same(dino(student, teacher), plain_dino(reference, teacher.double()), student, reference)


def test_dino_refuses_what_is_no_whole_number_of_crops():
    with pytest.raises(ValueError, match="whole crops"):
        dino(_randn(2 * BATCH + 1, K), _randn(2 * BATCH, K))


def test_ibot_is_a_mean_per_crop_over_all_crops_masked_or_not():
    crop = torch.tensor([0, 0, 0, 2, 2, 5])
    student, reference = _pair(6, K, seed=0)
    teacher = torch.softmax(_randn(6, K, seed=1), dim=1)
    _same(
        ibot(student, teacher, crop, 8), plain_ibot(reference, teacher.double(), crop, 8), student, reference
    )


def test_ibot_of_no_masked_patch_is_zero_with_a_gradient():
    student = torch.zeros(0, K, requires_grad=True)
    loss = ibot(student, torch.zeros(0, K), torch.zeros(0, dtype=torch.long), 8)
    loss.backward()
    assert loss.item() == 0 and student.grad is not None


def test_koleo_equals_the_formula():
    cls, reference = _pair(12, 6, seed=3)
    _same(koleo(cls), plain_koleo(reference), cls, reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_koleo_is_finite_for_duplicates_in_half_precision_and_under_autocast(dtype: torch.dtype):
    cls = _randn(3, 6).repeat(2, 1).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = koleo(cls)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and loss < -math.log(1e-8)
    assert cls.grad is not None and torch.isfinite(cls.grad).all()


def test_koleo_of_a_batch_of_one_is_zero():
    cls = _randn(1, 6).requires_grad_()
    koleo(cls).backward()
    assert cls.grad is not None and not cls.grad.any()


def _on_a_rank(scores: Tensor, cls: Tensor) -> dict[str, Tensor]:
    """This rank's part of the batch, as training sees it: gradients of ranks are averaged."""
    rows = slice(rank() * len(scores) // world(), (rank() + 1) * len(scores) // world())
    own = cls[rows].clone().requires_grad_()
    loss = koleo(own, across_ranks=True)
    loss.backward()
    assert own.grad is not None
    return {
        "sinkhorn": sinkhorn(scores[rows], 0.07),
        "uneven": sinkhorn(scores[: 3 * rank()], 0.07),  # rank 0 has no masked patch
        "center": next_center(torch.zeros(K), scores[: 3 * rank()]),
        "koleo": loss.detach(),
        "gradient": own.grad / world(),
    }


@pytest.mark.parametrize("ranks", [2, 4])
def test_losses_do_not_depend_on_the_number_of_ranks(ranks: int):
    scores, cls = _randn(16, K), _randn(16, 6, seed=1)
    found = on_ranks(ranks, _on_a_rank, scores, cls)
    whole = cls.clone().requires_grad_()
    loss = koleo(whole)
    loss.backward()
    together = {
        name: torch.cat([part[name] for part in found]) for name in ("sinkhorn", "uneven", "gradient")
    }
    torch.testing.assert_close(together["sinkhorn"], sinkhorn(scores, 0.07))
    everyone = torch.cat([scores[: 3 * index] for index in range(ranks)])
    torch.testing.assert_close(together["uneven"], sinkhorn(everyone, 0.07))
    torch.testing.assert_close(found[0]["center"], next_center(torch.zeros(K), everyone))
    torch.testing.assert_close(torch.stack([part["koleo"] for part in found]).mean(), loss.detach())
    torch.testing.assert_close(together["gradient"], whole.grad)
