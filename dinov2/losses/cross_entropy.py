"""The two self-distillation losses: DINO between crops of an image, iBOT at masked patches.

Each takes the student's bottleneck features and the prototypes, not their product: on many prototypes the
scores are by far the largest thing of a step. They, and their gradient, are made some rows at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dinov2.losses.targets import CHUNK, Targets, slices, wide

STUDENT_TEMPERATURE = 0.1


@dataclass(frozen=True)
class Part:
    """Some rows of a loss."""

    rows: Int[Tensor, " some"] | slice  # of the student's features
    targets: Float[Tensor, "some prototypes"]
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
        chunk: scores in float32 at a time; 0 for all at once.

    Returns:
        Mean over the batch, divided by the number of terms, 2 * local crops + 2.
    """
    batch = len(teacher) // 2
    crops = len(student) // batch
    if crops == 1 or len(student) % batch:
        raise ValueError(f"{len(student)} student rows are not whole crops of a batch of {batch}")
    locals_ = crops - 2
    index = torch.arange(len(student), device=student.device).unflatten(0, (crops, batch))

    def parts() -> Iterator[Part]:
        for images in slices(batch, crops * len(prototypes), chunk):
            first = teacher.of(images)
            second = teacher.of(slice(batch + images.start, batch + images.stop))
            # Cross-entropy is linear in the target, so a crop meets the sum of all its targets at once.
            targets = torch.cat([second, first, *[first + second] * locals_])
            mass = targets.new_ones(crops, len(first))
            mass[2:] = 2.0
            weight = torch.full_like(mass, 1 / (batch * (2 * locals_ + 2)))
            yield Part(index[:, images].flatten(), targets, mass.flatten(), weight.flatten())

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
        chunk: scores in float32 at a time; 0 for all at once.

    Returns:
        Sum over crops of the mean cross-entropy over a crop's masked patches, divided by `crops`.
    """
    if len(student) == 0:  # zero, and part of the graph: every rank has the same backward
        return wide(student).sum() + 0.0 * wide(prototypes[:1]).sum()
    weight = 1 / (crops * torch.bincount(crop, minlength=crops)[crop]).to(wide(student[:0]).dtype)

    def parts() -> Iterator[Part]:
        for rows in slices(len(teacher), len(prototypes), chunk):
            targets = teacher.of(rows)
            yield Part(rows, targets, targets.new_ones(len(targets)), weight[rows])

    return _cross_entropy(student, prototypes, parts, temperature, chunk)


def _cross_entropy(
    student: Tensor, prototypes: Tensor, parts: Parts, temperature: float, chunk: int
) -> Tensor:
    """The weighted sum of -targets * log softmax(student . prototypes / temperature); float32 at least."""
    if chunk:
        return _InParts.apply(student, prototypes, parts, temperature)
    (part,) = parts()
    logits = wide(student[part.rows] @ prototypes.to(student.dtype).T) / temperature
    return _weighed(part, logits, torch.logsumexp(logits, dim=1))


def _weighed(part: Part, logits: Float[Tensor, "some prototypes"], total: Float[Tensor, " some"]) -> Tensor:
    return (part.weight * (part.mass * total - torch.linalg.vecdot(part.targets, logits))).sum()


class _InParts(torch.autograd.Function):
    """The same, the gradient with the value: a part's scores are gone before the next part's are made."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, prototypes: Tensor, parts: Parts, temperature: float) -> Tensor:
        narrow = prototypes.to(student.dtype)
        loss = wide(student).new_zeros(())
        to_student, to_prototypes = torch.zeros_like(student), torch.zeros_like(prototypes)
        for part in parts():
            rows = student[part.rows]
            logits = wide(rows @ narrow.T).div_(temperature)
            total = torch.logsumexp(logits, dim=1)
            loss += _weighed(part, logits, total)
            chosen = logits.sub_(total[:, None]).exp_()  # from here on, of the logits only these are left
            gradient = chosen.mul_(part.mass[:, None]).sub_(part.targets)
            gradient.mul_(part.weight[:, None] / temperature)
            to_student[part.rows] = gradient.to(student.dtype) @ narrow
            to_prototypes += gradient.to(student.dtype).T @ rows
        ctx.save_for_backward(to_student, to_prototypes)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]  # one output
        to_student, to_prototypes = ctx.saved_tensors
        return to_student * grad, to_prototypes * grad, None, None
