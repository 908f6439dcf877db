"""The two self-distillation losses: DINO between crops of an image, iBOT at masked patches.

Each takes the student's bottleneck features and the prototypes, not their product: on many prototypes the
scores are by far the largest thing of a step. They, and their gradient, are made some rows at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dinov2.losses.targets import CHUNK, Targets, slices, wide

STUDENT_TEMPERATURE = 0.1
BLOCK = 2**24  # scores in the student's type at a time
PIECE = 2**13  # prototypes whose gradient is summed at a time


@dataclass(frozen=True)
class Part:
    """Some rows of a loss."""

    rows: Int[Tensor, " some"]  # of the student's features
    targets: Callable[[], Float[Tensor, "some prototypes"]]  # made when they are needed
    mass: Float[Tensor, " some"]  # what a row of targets sums to
    weight: Float[Tensor, " some"]  # of a row's cross-entropy in the loss


Parts = Callable[[], Iterator[Part]]


def dino(
    student: Float[Tensor, "crops*batch dim"],
    prototypes: Float[Tensor, "prototypes dim"],
    teacher: Targets,
    *,
    temperature: float = STUDENT_TEMPERATURE,
    chunk: int = CHUNK,
) -> Float[Tensor, ""]:
    """Every teacher view against every other crop of the same image (DINO eq. 3).

    Crops are stacked crop by crop: all first views of the batch, all second views, then each local crop.

    Args:
        student: bottleneck features of the two global crops, then of the local ones (possibly none); scores
            are their products with `prototypes`.
        teacher: targets of the two global crops.
        chunk: scores in float32 at a time; 0 for all at once, -1 for what suits the device.

    Returns:
        Mean over the batch, divided by the number of terms, 2 * local crops + 2.
    """
    batch = len(teacher) // 2
    crops = len(student) // batch
    if crops == 1 or len(student) % batch:
        raise ValueError(f"{len(student)} student rows are not whole crops of a batch of {batch}")
    locals_ = crops - 2
    index = torch.arange(len(student), device=student.device).unflatten(0, (crops, batch))

    def targets(images: slice) -> Float[Tensor, "some prototypes"]:
        first, second = teacher.of(images), teacher.of(slice(batch + images.start, batch + images.stop))
        # Cross-entropy is linear in the target, so a crop meets the sum of all its targets at once.
        return torch.cat([second, first, *[first + second] * locals_])

    def parts() -> Iterator[Part]:
        for images in slices(batch, crops * len(prototypes), chunk, student.device):
            rows = index[:, images]
            mass = torch.ones_like(rows, dtype=wide(student[:0]).dtype)
            mass[2:] = 2.0
            weight = torch.full_like(mass, 1 / (batch * (2 * locals_ + 2)))
            yield Part(rows.flatten(), partial(targets, images), mass.flatten(), weight.flatten())

    return _cross_entropy(student, prototypes, parts, temperature, chunk)


def ibot(
    student: Float[Tensor, "masked dim"],
    prototypes: Float[Tensor, "prototypes dim"],
    teacher: Targets,
    crop: Int[Tensor, " masked"],
    crops: int,
    *,
    temperature: float = STUDENT_TEMPERATURE,
    chunk: int = CHUNK,
) -> Float[Tensor, ""]:
    """The teacher's patch targets predicted at masked patches (iBOT eq. 2).

    Args:
        student: bottleneck features of the masked patches, possibly none.
        teacher: their targets.
        crop: which global crop each masked patch lies in.
        crops: the number of global crops, masked or not, that the sum is divided by.
        chunk: scores in float32 at a time; 0 for all at once, -1 for what suits the device.

    Returns:
        Sum over crops of the mean cross-entropy over a crop's masked patches, divided by `crops`.
    """
    if len(student) == 0:  # zero, and part of the graph: every rank has the same backward
        return wide(student).sum() + 0.0 * wide(prototypes[:1]).sum()
    weight = 1 / (crops * torch.bincount(crop, minlength=crops)[crop]).to(wide(student[:0]).dtype)

    index = torch.arange(len(student), device=student.device)

    def parts() -> Iterator[Part]:
        for rows in slices(len(teacher), len(prototypes), chunk, student.device):
            yield Part(index[rows], partial(teacher.of, rows), torch.ones_like(weight[rows]), weight[rows])

    return _cross_entropy(student, prototypes, parts, temperature, chunk)


def _cross_entropy(
    student: Tensor, prototypes: Tensor, parts: Parts, temperature: float, chunk: int
) -> Tensor:
    """The weighted sum of -targets * log softmax(student . prototypes / temperature); float32 at least."""
    if chunk:
        return _InParts.apply(student, prototypes, parts, temperature)
    (part,) = parts()
    logits = wide(student[part.rows] @ prototypes.to(student.dtype).T) / temperature
    return _weighed(part.weight, part.targets(), torch.log_softmax(logits, dim=1))


def _weighed(weight: Tensor, targets: Tensor, logs: Tensor) -> Float[Tensor, ""]:
    return -(weight * torch.linalg.vecdot(targets, logs)).sum()


class _InParts(torch.autograd.Function):
    """The same, the gradient with the value.

    Products are of blocks of rows, whose scores are kept in the student's type and give way to their gradient
    part by part; in float32 there is only a part.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, prototypes: Tensor, parts: Parts, temperature: float) -> Tensor:
        narrow = prototypes.to(student.dtype)
        loss = wide(student).new_zeros(())
        to_student, to_prototypes = torch.zeros_like(student), torch.zeros_like(prototypes)
        for block in _blocks(parts(), BLOCK // len(prototypes)):
            index = torch.cat([part.rows for part in block])
            rows = student[index]
            scores = rows @ narrow.T
            for part, own in zip(block, scores.split([len(part.rows) for part in block]), strict=True):
                logs = torch.log_softmax(wide(own, copy=True).mul_(1 / temperature), dim=1)
                targets = part.targets()
                loss += _weighed(part.weight, targets, logs)
                scale = part.weight[:, None] / temperature
                own.copy_(logs.exp_().mul_(part.mass[:, None] * scale).sub_(targets.mul_(scale)))
            to_student[index] = scores @ narrow
            for sums, own in zip(to_prototypes.split(PIECE), scores.split(PIECE, dim=1), strict=True):
                sums += own.T @ rows
        ctx.gradients = to_student, to_prototypes
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]  # one output
        if ctx.gradients is None:
            raise RuntimeError("the gradient of this loss was taken already; it is not kept")
        to_student, to_prototypes = (gradient.mul_(grad) for gradient in ctx.gradients)
        ctx.gradients = None
        return to_student, to_prototypes, None, None


def _blocks(parts: Iterator[Part], rows: int) -> Iterator[list[Part]]:
    """Parts of so many rows together, or one part that has more."""
    block: list[Part] = []
    for part in parts:
        if block and sum(len(own.rows) for own in [*block, part]) > rows:
            yield block
            block = []
        block.append(part)
    if block:
        yield block
