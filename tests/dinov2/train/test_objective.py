"""A step as a whole: what accumulating changes, which collectives it needs, and the memory of many scores."""

import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode

from dinov2.config import read
from dinov2.losses.targets import next_centers
from dinov2.optim import Schedules, clip_gradients, set_rates
from dinov2.ssl.objective import Views, objective
from dinov2.train.config import TrainConfig
from dinov2.train.gate import agree
from dinov2.train.state import State, fresh_state
from tests.ranks import on_ranks

BATCH = 8
WORDS = f"""data=x output=x steps=10 batch={BATCH} precision=fp32
model.size=vit_tiny model.depth=2 model.patch=8 model.drop_path=0 model.layer_scale=0.5
heads.separate=true heads.dino.hidden=32 heads.dino.bottleneck=16 heads.dino.prototypes=64
heads.ibot.hidden=32 heads.ibot.bottleneck=16 heads.ibot.prototypes=32
augment.global_size=32 augment.local_size=16 augment.local_crops=2""".split()
CPU = torch.device("cpu")


def _views(batch: int) -> Views:
    """Random crops; a different share of the patches of each is masked, of some none."""
    draw = torch.Generator().manual_seed(0)
    shares = torch.linspace(0, 0.6, 2 * batch)[torch.randperm(2 * batch, generator=draw)]
    return Views(
        global_crops=torch.randn(2 * batch, 3, 32, 32, generator=draw),
        local_crops=torch.randn(2 * batch, 3, 16, 16, generator=draw),
        masks=torch.rand(2 * batch, 16, generator=draw) < shares[:, None],
    )


def _config(*words: str) -> TrainConfig:
    return read(TrainConfig, [*WORDS, *words])


def _gradient(config: TrainConfig) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The gradient of a step by parameter, and the centres after it, on one process."""
    state = fresh_state(config, "", CPU)
    totals: dict[str, torch.Tensor] = {}
    for part in _views(config.batch).parts(config.accumulate):
        outcome = _objective(config, state, part)
        (outcome.total(config.losses.weights()) / config.accumulate).backward()
        totals = {name: totals.get(name, 0) + own for name, own in outcome.totals.items()}
    gradients = {name: p.grad for name, p in state.student.named_parameters() if p.grad is not None}
    return gradients, next_centers(state.centers, totals)


def _objective(config: TrainConfig, state: State, views: Views):
    rates = Schedules(optim=config.optim, teacher=config.teacher, steps=10, batch=8, pictures=8).at(1)
    set_rates(state.optimizer, rates)
    return objective(
        state.student,
        state.teacher,
        views,
        rates,
        state.centers,
        losses=config.losses,
        targets=config.teacher,
    )


def _apart(whole: dict[str, torch.Tensor], parts: dict[str, torch.Tensor]) -> float:
    difference = sum(float((whole[name] - parts[name]).square().sum()) for name in whole)
    return (difference / sum(float(own.square().sum()) for own in whole.values())) ** 0.5


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_are_the_whole_batchs_but_for_what_looks_across_pictures(parts: int):
    alike = ["teacher.targets=centering", "losses.koleo=0"]
    whole, centers = _gradient(_config(*alike))
    found, moved = _gradient(_config(*alike, f"accumulate={parts}"))
    assert _apart(whole, found) < 1e-5
    torch.testing.assert_close(moved, centers)
    # KoLeo looks for neighbours, Sinkhorn for a balance, within a micro-batch: another gradient
    for across in (["teacher.targets=centering"], ["losses.koleo=0"]):
        whole, _ = _gradient(_config(*across))
        assert _apart(whole, _gradient(_config(*across, f"accumulate={parts}"))[0]) > 1e-4


@pytest.mark.parametrize("targets", ["sinkhorn", "centering"])
def test_scores_in_parts_give_the_gradient_of_all_at_once(targets: str):
    words = [f"teacher.targets={targets}", "heads.dino.norm_last=false", "heads.ibot.weight_norm=false"]
    whole, _ = _gradient(_config(*words, "losses.chunk=0"))
    assert _apart(whole, _gradient(_config(*words, "losses.chunk=200"))[0]) < 1e-5


def _collectives(*words: str) -> dict[str, int]:
    config = _config(*words)
    state = fresh_state(config, "", CPU)
    with CommDebugMode() as counted:
        outcome = _objective(config, state, _views(4))
        outcome.total(config.losses.weights()).backward()
        norms = clip_gradients(state.student.parts(), 3.0, config.optim.clip_per)
        agree(outcome.total(config.losses.weights()).detach(), norms, False)
        next_centers(state.centers, outcome.totals)
    return dict(Counter({str(kind).rpartition(".")[2]: n for kind, n in counted.get_comm_counts().items()}))


CASES = {
    "sinkhorn": ["losses.koleo=0"],
    "centering": ["losses.koleo=0", "teacher.targets=centering"],
    "dino": ["losses.koleo=0", "losses.ibot=0", "optim.clip_per=parameter"],
    "koleo": ["losses.koleo_across_ranks=true"],
}


def _all_collectives() -> dict[str, dict[str, int]]:
    return {name: _collectives(*words) for name, words in CASES.items()}


@pytest.mark.parametrize("rest", ["model.drop_path=0.4", "model.drop_path=0 losses.ibot=0 model.registers=2"])
def test_a_last_block_that_leaves_out_unseen_patches_gives_the_same_gradient(rest: str):
    torch.manual_seed(0)
    gradients, centers = _gradient(_config(*rest.split()))
    torch.manual_seed(0)  # which crops are kept
    expected, expected_centers = _gradient(_config(*rest.split(), "model.trim=false"))
    assert gradients.keys() == expected.keys() and "backbone.blocks.1.mlp.fc2.weight" in gradients
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-7, name
    assert all(torch.allclose(centers[name], own) for name, own in expected_centers.items())


def test_a_step_needs_these_collectives_and_no_more():
    """Two blocks and what is outside of them: 3 gathers of weights forward and 3 backward for the student, 3
    for the teacher; gradients scattered 3 times. Besides, sums over ranks of small things: 2 a round for the
    Sinkhorn of images and patches together, or 1 for both centres; 1 for the norms; 1 for the decision.
    """
    sharded = {"_allgather_base_": 9, "_reduce_scatter_base_": 3}
    for found in on_ranks(2, _all_collectives):
        assert found == {
            "sinkhorn": sharded | {"allreduce_": 3 * 2 + 2},
            "centering": sharded | {"allreduce_": 1 + 2},
            "dino": sharded | {"allreduce_": 3 * 2 + 2},
            # features of both views out, their gradients back
            "koleo": sharded | {"_allgather_base_": 9 + 2, "allreduce_": 3 * 2 + 2 + 2},
        }


PEAK = """
import sys, torch
from dinov2.losses.cross_entropy import ibot
from dinov2.losses.targets import sinkhorn
torch.set_num_threads(1)
rows, dim, prototypes, chunk = 2048, 64, 16384, int(sys.argv[1])
student = torch.randn(rows, dim).bfloat16().requires_grad_()
weights = torch.randn(prototypes, dim).requires_grad_()
teacher = torch.randn(rows, prototypes, dtype=torch.bfloat16)
def peak():  # not getrusage's, which begins at what the parent held
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
(targets,) = sinkhorn([teacher], 0.07, rounds=1, chunk=chunk)
ibot(student, weights, targets, torch.arange(rows) // 64, 64, chunk=chunk).backward()
print((peak() - before) * 1024 / (4 * rows * prototypes))
"""


def test_no_float32_copy_of_all_scores_is_ever_made():
    """In copies of the 128 MiB that [tokens x prototypes] take in float32, beyond the teacher's own bf16."""
    copies = {}
    for chunk in (0, 2**20):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(chunk)],
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed goes back at once
            capture_output=True,
            text=True,
            check=True,
            timeout=250,
        )
        copies[chunk] = float(done.stdout)
    assert copies[0] > 3 and copies[2**20] < 0.75, copies
