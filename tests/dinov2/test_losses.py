"""Each loss against a plain float64 reference, values and gradients, on one process and on several ranks."""

import math

import pytest
import torch
from torch import Tensor

from dinov2.losses import cross_entropy
from dinov2.losses import targets as module
from dinov2.losses.cross_entropy import dino, ibot
from dinov2.losses.koleo import koleo
from dinov2.losses.targets import RANGE, Targets, centered, next_centers, score_totals, sinkhorn
from dinov2.parallel import rank, world
from tests.ranks import on_ranks

BATCH, LOCALS, K, DIM = 4, 3, 16, 6
CHUNKS = [0, 1, 7 * K, 2**24]  # all at once, row by row, uneven parts, one part


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


def _all(targets: Targets) -> Tensor:
    return targets.of(slice(None))


def _given(distributions: Tensor) -> Targets:
    """Targets that are exactly these distributions."""
    return Targets(distributions.log(), 1.0, torch.zeros(distributions.shape[1], dtype=distributions.dtype))


@pytest.mark.parametrize("size", [0.3, 1.0])  # exponentials of all keep their digits, or not
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("kept", [2**26, 0])
def test_sinkhorn_equals_the_printed_algorithm(
    chunk: int, size: float, kept: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "KEPT", kept)
    cls, patches = size * _randn(8, K).double(), size * _randn(11, K + 3, seed=1).double()
    assert all((float(own.max() - own.min()) < RANGE * 0.07) == (size < 1) for own in (cls, patches))
    for found, scores in zip(sinkhorn([cls, patches], 0.07, chunk=chunk), (cls, patches), strict=True):
        torch.testing.assert_close(_all(found), plain_sinkhorn(scores, 0.07), rtol=1e-10, atol=1e-12)


def test_sinkhorn_in_half_precision_is_that_of_the_rounded_scores():
    scores = _randn(8, K).bfloat16()
    (found,) = sinkhorn([scores], 0.07)
    torch.testing.assert_close(_all(found).double(), plain_sinkhorn(scores, 0.07), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1.5, 1e3, 1e6])
@pytest.mark.parametrize("chunk", [0, 2**14])
def test_sinkhorn_is_finite_for_logits_of_any_size(scale: float, chunk: int):
    (targets,) = sinkhorn([scale * _randn(64, 4096)], 0.04, chunk=chunk)
    assert torch.isfinite(_all(targets)).all()
    torch.testing.assert_close(_all(targets).sum(dim=1), torch.ones(64))


def test_sinkhorn_spreads_what_a_plain_softmax_gives_to_one_prototype():
    scores = _randn(32, 8) + torch.tensor([5.0] + [0.0] * 7)
    (targets,) = sinkhorn([scores], 0.5, rounds=50)
    torch.testing.assert_close(_all(targets).sum(dim=0), torch.full((8,), 4.0), rtol=1e-3, atol=1e-3)


def test_centering_equals_the_formula_and_leaves_its_inputs():
    scores, center = _randn(8, K), _randn(K, seed=1)
    before = scores.clone(), center.clone()
    reference = torch.softmax((scores.double() - center.double()) / 0.04, dim=1)
    torch.testing.assert_close(_all(centered(scores, center, 0.04)).double(), reference, rtol=1e-4, atol=1e-6)
    halves = score_totals(scores[:3]) + score_totals(scores[3:])  # two micro-batches
    moved = next_centers({"a": center, "b": center}, {"a": halves}, 0.9)
    torch.testing.assert_close(moved, {"a": 0.9 * center + 0.1 * scores.mean(dim=0)})
    assert torch.equal(scores, before[0]) and torch.equal(center, before[1])


def test_a_centre_stays_where_nothing_was_masked():
    center = _randn(K)
    assert torch.equal(next_centers({"ibot": center}, {"ibot": score_totals(_randn(0, K))})["ibot"], center)


Pair = tuple[Tensor, Tensor]


def _student(rows: int) -> tuple[Pair, Pair]:
    """Features and prototypes in float64, for ours and for the reference."""
    features, prototypes = _randn(rows, DIM, seed=2).double(), _randn(K, DIM, seed=3).double()
    ours = features.clone().requires_grad_(), prototypes.clone().requires_grad_()
    return ours, (features.requires_grad_(), prototypes.requires_grad_())


def _same_gradients(ours: Tensor, plain: Tensor, inputs: Pair, reference: Pair) -> None:
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)
    (3.0 * ours).backward()
    (3.0 * plain).backward()
    for own, other in zip(inputs, reference, strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_dino_equals_a_loop_over_pairs_of_crops(chunk: int):
    inputs, reference = _student((LOCALS + 2) * BATCH)
    teacher = torch.softmax(_randn(2 * BATCH, K, seed=1).double() / 0.04, dim=1)
    ours = dino(*inputs, _given(teacher), chunk=chunk)
    _same_gradients(ours, plain_dino(reference[0] @ reference[1].T, teacher), inputs, reference)


def test_dino_refuses_what_is_no_whole_number_of_crops():
    with pytest.raises(ValueError, match="whole crops"):
        dino(_randn(2 * BATCH + 1, DIM), _randn(K, DIM), _given(torch.ones(2 * BATCH, K) / K))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_ibot_is_a_mean_per_crop_over_all_crops_masked_or_not(chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        cross_entropy, "BLOCK", 2 * K
    )  # several products of two rows, or of one part that is more
    crop = torch.tensor([0, 0, 0, 2, 2, 5])
    inputs, reference = _student(6)
    teacher = torch.softmax(_randn(6, K, seed=1).double(), dim=1)
    ours = ibot(*inputs, _given(teacher), crop, 8, chunk=chunk)
    _same_gradients(ours, plain_ibot(reference[0] @ reference[1].T, teacher, crop, 8), inputs, reference)


@pytest.mark.parametrize("chunk", [0, 7 * K])
def test_cross_entropy_under_autocast_is_that_of_rounded_scores(chunk: int):
    """bf16 rounds to three digits; a sum that is accumulated in bf16 would lose far more than that."""
    crop = torch.arange(400) // 100
    features, prototypes = _randn(400, DIM, seed=2).requires_grad_(), _randn(K, DIM, seed=3).requires_grad_()
    teacher = torch.softmax(_randn(400, K, seed=1), dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ibot(features.bfloat16(), prototypes, _given(teacher), crop, 4, chunk=chunk)
    loss.backward()
    inputs = [x.detach().double().requires_grad_() for x in (features, prototypes)]
    plain = plain_ibot(inputs[0] @ inputs[1].T, teacher.double(), crop, 4)
    plain.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(plain.item(), rel=2e-3)
    for own, other in zip((features, prototypes), inputs, strict=True):
        assert own.grad is not None and other.grad is not None
        difference = (own.grad.double() - other.grad).norm() / other.grad.norm()
        assert float(difference) < 2e-2


def test_ibot_of_no_masked_patch_is_zero_with_a_gradient():
    student, prototypes = torch.zeros(0, DIM, requires_grad=True), _randn(K, DIM).requires_grad_()
    loss = ibot(student, prototypes, _given(torch.zeros(0, K)), torch.zeros(0, dtype=torch.long), 8)
    loss.backward()
    assert loss.item() == 0 and student.grad is not None and prototypes.grad is not None


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
    pairs = cls[rows].clone().requires_grad_()
    koleo(pairs, across_ranks=True, group=2).backward()
    assert pairs.grad is not None
    return {
        **sinkhorn_of(scores[rows], 1e4 * scores[: 3 * rank()], 2 * K),  # rank 0 has no masked patch
        "center": next_centers({"a": torch.zeros(K)}, {"a": score_totals(scores[: 3 * rank()])})["a"],
        "koleo": loss.detach(),
        "gradient": own.grad / world(),
        "pairs": pairs.grad / 2,  # of two ranks that look for neighbours together
    }


def sinkhorn_of(scores: Tensor, uneven: Tensor, chunk: int) -> dict[str, Tensor]:
    cls, patches = sinkhorn([scores, uneven], 0.07, chunk=chunk)
    return {"sinkhorn": _all(cls), "uneven": _all(patches)}


@pytest.mark.parametrize("ranks", [2, 4])
def test_losses_do_not_depend_on_the_number_of_ranks(ranks: int):
    scores, cls = _randn(16, K), _randn(16, 6, seed=1)
    found = on_ranks(ranks, _on_a_rank, scores, cls)
    reference = cls.double().requires_grad_()
    plain = plain_koleo(reference)
    plain.backward()
    together = {
        name: torch.cat([part[name] for part in found])
        for name in ("sinkhorn", "uneven", "gradient", "pairs")
    }
    everyone = torch.cat([scores[: 3 * index] for index in range(ranks)])
    alone = sinkhorn_of(scores, 1e4 * everyone, 0)
    for name, targets in alone.items():
        torch.testing.assert_close(together[name], targets, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        together["sinkhorn"].double(), plain_sinkhorn(scores, 0.07), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(found[0]["center"], 0.1 * everyone.mean(dim=0))
    torch.testing.assert_close(torch.stack([part["koleo"] for part in found]).mean().double(), plain.detach())
    torch.testing.assert_close(together["gradient"].double(), reference.grad, rtol=1e-4, atol=1e-6)
    pairs = cls.double().requires_grad_()
    torch.stack([plain_koleo(pair) for pair in pairs.chunk(ranks // 2)]).sum().backward()
    torch.testing.assert_close(together["pairs"].double(), pairs.grad, rtol=1e-4, atol=1e-6)


def test_sinkhorn_is_in_float32_inside_of_autocast():
    """On a rank without masked patches nothing is multiplied: all ranks must bring the same type."""
    scores = torch.nn.functional.normalize(torch.randn(24, 40, generator=torch.Generator().manual_seed(0)))
    (alone,) = sinkhorn([scores.bfloat16()], 0.07)
    with torch.autocast("cpu", torch.bfloat16):
        (inside,) = sinkhorn([scores.bfloat16()], 0.07)
    assert inside.columns.dtype == torch.float32
    torch.testing.assert_close(inside.columns, alone.columns, rtol=0, atol=0)
