"""Linear layers by oneDNN against torch's own and against float64; memory that stays with the process."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dinov2.config import read
from dinov2.models.linear import has_onednn, linear, use_onednn
from dinov2.optim import Schedules
from dinov2.ssl.objective import Views, objective
from dinov2.train.config import TrainConfig
from dinov2.train.state import fresh_state

CPU = torch.device("cpu")
WORDS = """data=x output=x steps=9 precision=fp32 model.size=vit_tiny model.depth=2 model.patch=8
model.layer_scale=1 heads.dino.prototypes=64 augment.global_size=48 augment.local_size=24"""

pytestmark = pytest.mark.skipif(not has_onednn(), reason="this torch has no oneDNN")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(1,), (300,), (3, 50), (0,)])
def test_values_and_gradients_are_as_exact_as_torchs(rows: tuple[int, ...], bias: bool):
    torch.manual_seed(0)
    layer = nn.Linear(192, 576, bias=bias)
    x, upstream = torch.randn(*rows, 192), torch.randn(*rows, 576)
    wanted = values_and_gradients(layer.double(), layer.forward, x.double(), upstream.double())
    layer.float()
    theirs = values_and_gradients(layer, layer.forward, x, upstream)
    ours = values_and_gradients(layer, lambda given: linear(layer, given), x, upstream)
    for own, other, exact in zip(ours, theirs, wanted, strict=True):
        assert own.shape == exact.shape and own.dtype == torch.float32
        if exact.numel():
            allowed = 2 * (other - exact).abs().max() + 1e-6 * exact.abs().max()
            assert (own - exact).abs().max() <= allowed


def values_and_gradients(
    layer: nn.Linear, forward: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor
) -> list[Tensor]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    given = forward(x)
    given.backward(upstream)
    return [given.detach(), *(own.grad for own in (x, *layer.parameters()) if own.grad is not None)]


def test_a_step_by_onednn_equals_one_by_torch():
    outcomes = {}
    for setting in ("true", "false"):
        config = read(TrainConfig, [*WORDS.split(), f"onednn={setting}"])
        state = fresh_state(config, "", CPU)
        draw = torch.Generator().manual_seed(0)
        views = Views(
            global_crops=torch.randn(8, 3, 48, 48, generator=draw),
            local_crops=torch.randn(32, 3, 24, 24, generator=draw),
            masks=torch.rand(8, 36, generator=draw) < 0.3,
        )
        rates = Schedules(optim=config.optim, teacher=config.teacher, steps=9, batch=4, pictures=9).at(3)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            outcome = objective(
                state.student,
                state.teacher,
                views,
                rates,
                {},
                losses=config.losses,
                targets=config.teacher,
                generator=torch.Generator().manual_seed(1),
            )
            outcome.total(config.weights()).backward()
        used = any("_linear_pointwise" in event.key for event in seen.key_averages())
        assert used == (setting == "true")
        gradient = torch.cat([p.grad.flatten() for p in state.student.parameters() if p.grad is not None])
        outcomes[setting] = outcome.total(config.weights()).item(), gradient
    (loss, ours), (other, theirs) = outcomes.values()
    assert loss == pytest.approx(other, rel=1e-5)
    assert torch.linalg.vector_norm(ours - theirs) < 1e-4 * torch.linalg.vector_norm(theirs)


def test_half_precision_gives_torchs_own_bits():
    torch.manual_seed(0)
    layer = nn.Linear(192, 576)
    x, upstream = torch.randn(2, 70, 192), torch.randn(2, 70, 576)

    def halved(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return torch.autocast("cpu", torch.bfloat16)(forward)

    theirs = values_and_gradients(layer, halved(layer.forward), x, upstream)
    use_onednn(layer)
    ours = values_and_gradients(layer, halved(layer.forward), x, upstream)
    assert ours[0].dtype == torch.bfloat16 and ours[2].dtype == torch.float32
    assert all(torch.equal(own, other) for own, other in zip(ours, theirs, strict=True))


FAULTS = """
import resource, sys, torch
from dinov2.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
for turn in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(2**24)  # 64 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_freed_memory_is_used_again_without_asking_the_kernel():
    faults = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, check=True).stdout)
        for how in ("kept", "returned")
    }
    assert faults["kept"] < 100 < 10_000 < faults["returned"]
