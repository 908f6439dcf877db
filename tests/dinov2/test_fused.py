"""The kernel of the cross-entropies: by Triton's interpreter on a CPU, compiled where there is a GPU."""

from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dinov2.losses import cross_entropy
from dinov2.losses.targets import centered
from tests.dinov2.test_losses import BATCH, DIM, LOCALS, plain_dino, plain_ibot
from tests.ranks import on_ranks

K = 19  # prototypes: whole pieces and a part of one
SIZES = 1.0, 300.0  # of scores: the exponential of 300 / 0.07 has no number
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
CROP = torch.tensor([0, 0, 0, 2, 2, 5, 5, 6])


class Case(NamedTuple):
    kind: str
    size: float
    dtype: torch.dtype

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Student's features, prototypes, teacher's scores, their centre."""
        draw = torch.Generator().manual_seed(0)
        rows = (LOCALS + 2) * BATCH if self.kind == "dino" else 2 * BATCH
        shapes = (rows, DIM), (K, DIM), (2 * BATCH, K), (K,)
        student, prototypes, teacher, center = (torch.randn(*shape, generator=draw) for shape in shapes)
        return (self.size * student).to(self.dtype), prototypes, (self.size * teacher).to(self.dtype), center


CASES = [Case(*words) for words in product(["dino", "ibot"], SIZES, TOLERANCE)]


def _by_the_kernel(device: str) -> dict[Case, list[Tensor]]:
    """Loss and gradients of each case, in pieces of 8 prototypes and blocks of few rows."""
    from dinov2.losses import fused

    fused.BLOCK, cross_entropy.FUSED_BLOCK = 8, 3 * K
    cross_entropy.can_fuse = lambda student: True
    found = {}
    for case in CASES:
        student, prototypes, teacher, center = (x.to(device) for x in case.inputs())
        student.requires_grad_()
        prototypes.requires_grad_()
        targets = centered(teacher, center, 0.07)
        if case.kind == "dino":
            loss = cross_entropy.dino(student, prototypes, targets, chunk=2 * K)
        else:
            loss = cross_entropy.ibot(student, prototypes, targets, CROP.to(device), 8, chunk=2 * K)
        (3.0 * loss).backward()
        assert student.grad is not None and prototypes.grad is not None
        found[case] = [x.detach().cpu() for x in (loss, student.grad, prototypes.grad)]
    return found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_kernel_equals_float64(device: str, monkeypatch: pytest.MonkeyPatch):
    if device == "cpu":
        monkeypatch.setenv(
            "TRITON_INTERPRET", "1"
        )  # read when Triton is first imported: a process of its own
    (found,) = on_ranks(1, _by_the_kernel, device)
    assert len(found) == 8
    for case, (loss, *gradients) in found.items():
        student, prototypes, teacher, center = case.inputs()
        # scores are rounded to the student's type where they are made: the reference starts from those
        scores = (student @ prototypes.to(case.dtype).T).double().requires_grad_()
        targets = torch.softmax((teacher.double() - center.double()) / 0.07, dim=1)
        plain = plain_dino(scores, targets) if case.kind == "dino" else plain_ibot(scores, targets, CROP, 8)
        (3.0 * plain).backward()
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(plain.item(), rel=1e-5)
        assert scores.grad is not None
        references = scores.grad @ prototypes.double(), scores.grad.T @ student.double()
        for own, reference in zip(gradients, references, strict=True):
            assert float((own.double() - reference).norm() / reference.norm()) < TOLERANCE[case.dtype], case
