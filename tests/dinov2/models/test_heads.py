"""The projection head: its definition, and half precision."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from dinov2.models.heads import DINOHead


@pytest.mark.parametrize("norm_last", [True, False])
def test_scores_are_those_of_torchs_weight_norm(norm_last: bool) -> None:
    head = DINOHead(24, hidden=32, bottleneck=8, prototypes=50, norm_last=norm_last).double()
    last = weight_norm(nn.Linear(8, 50, bias=False).double())
    last.weight = head.prototypes.weight.detach()
    length, direction = last.get_submodule("parametrizations.weight").parameters()
    with torch.no_grad():
        length.fill_(1)
        if head.prototypes.length is not None:
            length.copy_(head.prototypes.length.uniform_(0.5, 2)[:, None])
    x = torch.randn(6, 24, dtype=torch.float64)
    y = head.mlp(x)
    scores, expected = head(x), last(y / y.norm(dim=-1, keepdim=True))
    assert torch.allclose(scores, expected)
    (ours,) = torch.autograd.grad(scores.sin().sum(), head.prototypes.weight)
    (theirs,) = torch.autograd.grad(expected.sin().sum(), direction)
    assert torch.allclose(ours, theirs)


def test_without_weight_norm_the_last_layer_is_linear_and_starts_alike() -> None:
    free, unit = (
        DINOHead(24, hidden=32, bottleneck=8, prototypes=50, weight_norm=weight_norm).double()
        for weight_norm in (False, True)
    )
    for head in (free, unit):
        head.init_weights(torch.Generator().manual_seed(0))
    x = torch.randn(6, 24, dtype=torch.float64)
    assert torch.allclose(free(x), unit(x))
    with torch.no_grad():
        free.prototypes.weight.mul_(3)
    assert torch.allclose(free(x), 3 * unit(x))


def test_initial_prototypes_have_unit_length_and_layers_are_counted() -> None:
    head = DINOHead(24, hidden=32, bottleneck=8, prototypes=50)
    assert torch.allclose(head.prototypes.directions().norm(dim=-1), torch.ones(50))
    assert [tuple(m.weight.shape) for m in head.mlp if isinstance(m, nn.Linear)] == [
        (32, 24),
        (32, 32),
        (8, 32),
    ]
    assert [type(m).__name__ for m in DINOHead(4, 6, 2, 5, layers=2, batch_norm=True).mlp] == [
        "Linear", "BatchNorm1d", "GELU", "Linear",
    ]  # fmt: skip
    assert len(DINOHead(4, bottleneck=2, prototypes=5, layers=1).mlp) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 3e3])
def test_half_precision_is_finite_and_normalised(dtype: torch.dtype, scale: float) -> None:
    head = DINOHead(24, hidden=32, bottleneck=256, prototypes=50)
    x = scale * torch.randn(6, 24)
    with torch.autocast("cpu", dtype):
        y = head.bottleneck(x.requires_grad_())
        scores = head(x)
    assert y.dtype == scores.dtype == dtype
    scores.float().sum().backward()
    assert scores.isfinite().all()
    if dtype == torch.bfloat16 or scale >= 1:  # near a length of 0 float16 gradients need their loss scaler
        assert x.grad is not None
        assert x.grad.isfinite().all()
    if scale == 1.0:
        assert torch.allclose(y.float().norm(dim=-1), torch.ones(6), atol=1e-2)


def test_the_initial_weights_follow_the_generator() -> None:
    heads = []
    for _ in range(2):
        with torch.device("meta"):
            head = DINOHead(24, hidden=32, bottleneck=8, prototypes=50, norm_last=False, batch_norm=True)
        head.to_empty(device="cpu")
        head.init_weights(torch.Generator().manual_seed(5))
        heads.append(head)
    for (name, first), second in zip(
        heads[0].state_dict().items(), heads[1].state_dict().values(), strict=True
    ):
        assert torch.equal(first, second), name
