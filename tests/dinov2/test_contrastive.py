"""SSCD's losses against the formulas as loops in float64, values and gradients, on 1, 2 and 4 ranks."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dinov2.losses.contrastive import contrastive
from dinov2.parallel import rank, world
from tests.ranks import on_ranks

PICTURES, DIM, TEMPERATURE = 8, 6, 0.05
# Which picture is mixed into the second view of which.
MIXED = {0: 1, 3: 6}


def _views() -> tuple[Tensor, Tensor]:
    """Descriptors and origins of the whole batch: [view, picture]."""
    draw = torch.Generator().manual_seed(3)
    descriptors = torch.randn(2, PICTURES, DIM, generator=draw, dtype=torch.float64)
    origins = torch.arange(PICTURES).repeat(2, 1)[..., None].repeat(1, 1, 2)
    for picture, other in MIXED.items():
        origins[1, picture, 1] = other
    return descriptors, origins


def _plain(descriptors: Tensor, origins: Tensor) -> tuple[Tensor, Tensor]:
    """The formulas, a view at a time."""
    unit = descriptors / descriptors.norm(dim=1, keepdim=True)
    seen = [set(pair) for pair in origins.tolist()]
    infonce, entropy = [], []
    for i in range(len(unit)):
        others = [k for k in range(len(unit)) if k != i]
        matches = [k for k in others if seen[i] & seen[k]]
        whole = sum(torch.exp(unit[i] @ unit[k] / TEMPERATURE) for k in others)
        terms = [-torch.log(torch.exp(unit[i] @ unit[j] / TEMPERATURE) / whole) for j in matches]
        infonce.append(sum(terms) / len(terms))
        distances = torch.stack([(unit[i] - unit[k]).norm() for k in others if not seen[i] & seen[k]])
        entropy.append(-torch.log(distances.min() + 1e-8))
    return torch.stack(infonce).mean(), torch.stack(entropy).mean()


def _on_a_rank() -> tuple[list[float], Tensor]:
    """The losses' means over ranks, and the gradient of this rank's pictures as sharded training takes it."""
    descriptors, origins = _views()
    share = slice(rank() * PICTURES // world(), (rank() + 1) * PICTURES // world())
    own = descriptors[:, share].flatten(0, 1).requires_grad_()
    losses = contrastive(own, origins[:, share].flatten(0, 1), temperature=TEMPERATURE)
    (losses[0] + 3 * losses[1]).backward()
    values = torch.stack(losses).detach()
    if world() > 1:
        dist.all_reduce(values)
    assert own.grad is not None
    return (values / world()).tolist(), own.grad.unflatten(0, (2, -1)) / world()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_both_losses_equal_the_formulas_on_any_number_of_ranks(ranks: int):
    descriptors, origins = _views()
    reference = descriptors.flatten(0, 1).requires_grad_()
    infonce, entropy = _plain(reference, origins.flatten(0, 1))
    (infonce + 3 * entropy).backward()
    assert reference.grad is not None
    results = [_on_a_rank()] if ranks == 1 else on_ranks(ranks, _on_a_rank)
    for values, _ in results:
        assert values == pytest.approx([infonce.item(), entropy.item()], rel=1e-12)
    gradient = torch.cat([gradient for _, gradient in results], dim=1)
    assert torch.allclose(gradient, reference.grad.unflatten(0, (2, -1)), rtol=1e-9, atol=1e-12)


def test_mixing_pictures_changes_what_matches():
    descriptors, origins = _views()
    mixed = contrastive(descriptors.flatten(0, 1), origins.flatten(0, 1))
    plain = contrastive(descriptors.flatten(0, 1), origins[..., :1].expand_as(origins).flatten(0, 1))
    assert all(abs(float(a - b)) > 1e-3 for a, b in zip(mixed[:1], plain[:1], strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_duplicates_and_a_batch_of_one_stay_finite(dtype: torch.dtype):
    rows = torch.ones(6, 4, dtype=dtype, requires_grad=True)
    origins = torch.tensor([0, 1, 2, 0, 1, 2])[:, None].expand(6, 2)
    with torch.autocast("cpu", dtype):
        losses = contrastive(rows * 1.0, origins)
    assert all(loss.dtype == torch.float32 and torch.isfinite(loss) for loss in losses)
    (losses[0] + losses[1]).backward()
    assert rows.grad is not None and torch.isfinite(rows.grad).all()
    alone = contrastive(torch.randn(2, 4), torch.zeros(2, 2, dtype=torch.long))
    assert [float(loss) for loss in alone] == [0.0, 0.0]  # one match and nobody else; no neighbour
