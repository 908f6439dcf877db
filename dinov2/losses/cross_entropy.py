"""The two self-distillation losses: DINO between crops of an image, iBOT at masked patches.

Each takes the student's bottleneck features and the prototypes, not their product: on many prototypes the
scores are by far the largest thing of a step. They, and their gradient, are made some rows at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dinov2.losses.targets import CHUNK, Targets, slices, wide

STUDENT_TEMPERATURE = 0.1
BLOCK, FUSED_BLOCK = 2**24, 2**26  # scores in the student's type at a time
PIECE = 2**13  # prototypes whose gradient is summed at a time


@dataclass(frozen=True)
class Part:
    """Some rows of a loss."""

    rows: Int[Tensor, " some"]  # of the student's features
    wanted: Int[Tensor, "some 2"]  # samples of the teacher that a row meets, the second -1 where it meets one
    targets: Callable[[], Float[Tensor, "some prototypes"]]  # their distributions' sums, made when needed
    weight: Float[Tensor, " some"]  # of a row's cross-entropy in the loss

    def mass(self) -> Float[Tensor, "some 1"]:
        """What a row of targets sums to."""
        return (self.wanted >= 0).sum(dim=1, keepdim=True).to(self.weight.dtype)


Parts = Callable[[], Iterator[Part]]


def dino(
    student: Float[Tensor, "crops*batch dim"],
    prototypes: Float[Tensor, "prototypes dim"],
    teacher: Targets,
    *,
    temperature: float = STUDENT_TEMPERATURE,
    chunk: int = CHUNK,
    fused: bool = True,
) -> Float[Tensor, ""]:
    """Every teacher view against every other crop of the same image (DINO eq. 3).

    Crops are stacked crop by crop: all first views of the batch, all second views, then each local crop.

    Args:
        student: bottleneck features of the two global crops, then of the local ones (possibly none); scores
            are their products with `prototypes`.
        teacher: targets of the two global crops.
        chunk: scores in float32 at a time; 0 for all at once, -1 for what suits the device.
        fused: on CUDA, by one kernel of Triton where chunk is not 0.

    Returns:
        Mean over the batch, divided by the number of terms, 2 * local crops + 2.
    """
    batch = len(teacher) // 2
    crops = len(student) // batch
    if crops == 1 or len(student) % batch:
        raise ValueError(f"{len(student)} student rows are not whole crops of a batch of {batch}")
    locals_ = crops - 2
    index = torch.arange(len(student), device=student.device).unflatten(0, (crops, batch))
    first, second, none = index[0], index[1], torch.full_like(index[0], -1)
    wanted = torch.stack([second, none, first, none, *[first, second] * locals_]).unflatten(0, (crops, 2))

    def targets(images: slice) -> Float[Tensor, "some prototypes"]:
        first, second = teacher.of(images), teacher.of(slice(batch + images.start, batch + images.stop))
        # Cross-entropy is linear in the target, so a crop meets the sum of all its targets at once.
        return torch.cat([second, first, *[first + second] * locals_])

    def parts() -> Iterator[Part]:
        for images in slices(batch, crops * len(prototypes), chunk, student.device):
            rows, met = index[:, images].flatten(), wanted[..., images].transpose(1, 2).flatten(0, 1)
            weight = torch.full_like(rows, 1 / (batch * (2 * locals_ + 2)), dtype=wide(student[:0]).dtype)
            yield Part(rows, met, partial(targets, images), weight)

    return _cross_entropy(student, prototypes, teacher, parts, temperature, chunk, fused)


def ibot(
    student: Float[Tensor, "masked dim"],
    prototypes: Float[Tensor, "prototypes dim"],
    teacher: Targets,
    crop: Int[Tensor, " masked"],
    crops: int,
    *,
    temperature: float = STUDENT_TEMPERATURE,
    chunk: int = CHUNK,
    fused: bool = True,
) -> Float[Tensor, ""]:
    """The teacher's patch targets predicted at masked patches (iBOT eq. 2).

    Args:
        student: bottleneck features of the masked patches, possibly none.
        teacher: their targets.
        crop: which global crop each masked patch lies in.
        crops: the number of global crops, masked or not, that the sum is divided by.
        chunk: scores in float32 at a time; 0 for all at once, -1 for what suits the device.
        fused: on CUDA, by one kernel of Triton where chunk is not 0.

    Returns:
        Sum over crops of the mean cross-entropy over a crop's masked patches, divided by `crops`.
    """
    if len(student) == 0:  # zero, and part of the graph: every rank has the same backward
        return wide(student).sum() + 0.0 * wide(prototypes[:1]).sum()
    weight = 1 / (crops * torch.bincount(crop, minlength=crops)[crop]).to(wide(student[:0]).dtype)

    index = torch.arange(len(student), device=student.device)
    wanted = torch.stack([index, torch.full_like(index, -1)], dim=1)

    def parts() -> Iterator[Part]:
        for rows in slices(len(teacher), len(prototypes), chunk, student.device):
            yield Part(index[rows], wanted[rows], partial(teacher.of, rows), weight[rows])

    return _cross_entropy(student, prototypes, teacher, parts, temperature, chunk, fused)


def _cross_entropy(
    student: Tensor,
    prototypes: Tensor,
    teacher: Targets,
    parts: Parts,
    temperature: float,
    chunk: int,
    fused: bool,
) -> Tensor:
    """The weighted sum of -targets * log softmax(student . prototypes / temperature); float32 at least."""
    if chunk:
        fusing = teacher if fused and can_fuse(student) else None
        return _InParts.apply(student, prototypes, fusing, parts, temperature)
    (part,) = parts()
    logits = wide(student[part.rows] @ prototypes.to(student.dtype).T) / temperature
    return _weighed(part.weight, part.targets(), torch.log_softmax(logits, dim=1))


def _weighed(weight: Tensor, targets: Tensor, logs: Tensor) -> Float[Tensor, ""]:
    return -(weight * torch.linalg.vecdot(targets, logs)).sum()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def can_fuse(student: Float[Tensor, "rows dim"]) -> bool:
    """Whether the kernel can take the place of plain tensors: it computes in float32, on CUDA."""
    return student.is_cuda and student.dtype != torch.float64 and _has_triton()


class _InParts(torch.autograd.Function):
    """The same, the gradient with the value.

    Products are of blocks of rows, whose scores are kept in the student's type and give way to their
    gradient: by one kernel where `fusing` has the teacher's targets, else part by part, and then no more
    than a part is ever in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        prototypes: Tensor,
        fusing: Targets | None,
        parts: Parts,
        temperature: float,
    ) -> Tensor:
        narrow = prototypes.to(student.dtype)
        loss = wide(student).new_zeros(())
        to_student, to_prototypes = torch.zeros_like(student), torch.zeros_like(prototypes)
        for block in _blocks(parts(), (FUSED_BLOCK if fusing else BLOCK) // len(prototypes)):
            index = torch.cat([part.rows for part in block])
            rows = student[index]
            scores = rows @ narrow.T
            if fusing:
                loss += _fused(scores, fusing, block, temperature)
            else:
                for part, own in zip(block, scores.split([len(part.rows) for part in block]), strict=True):
                    loss += _to_gradient(own, part, temperature)
            to_student[index] = scores @ narrow
            for sums, own in zip(to_prototypes.split(PIECE), scores.split(PIECE, dim=1), strict=True):
                sums += own.T @ rows
        ctx.gradients = to_student, to_prototypes
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]  # one output
        if ctx.gradients is None:
            raise RuntimeError("the gradient of this loss was taken already; it is not kept")
        to_student, to_prototypes = (gradient.mul_(grad) for gradient in ctx.gradients)
        ctx.gradients = None
        return to_student, to_prototypes, None, None, None


def _to_gradient(scores: Float[Tensor, "some prototypes"], part: Part, temperature: float) -> Tensor:
    """A part's loss; its scores give way to the gradient."""
    logits = wide(scores, copy=True).mul_(1 / temperature)
    chances = torch.softmax(logits, dim=1)
    # The likeliest has 1 / sum(exp(logits - highest)); logarithms of all would be another exponential of all.
    logsums = logits.amax(dim=1) - chances.amax(dim=1).log_()
    scale = part.weight[:, None] / temperature
    targets = part.targets().mul_(scale)
    met = torch.dot(targets.flatten(), logits.flatten())
    loss = (part.weight * part.mass().squeeze(1) * logsums).sum() - temperature * met
    scores.copy_(chances.mul_(part.mass() * scale).sub_(targets))
    return loss


def _fused(
    scores: Float[Tensor, "rows prototypes"], teacher: Targets, block: list[Part], temperature: float
) -> Tensor:
    """The same for the parts of a block, by one kernel."""
    from dinov2.losses.fused import fused_rows  # Triton comes with CUDA's torch alone

    wanted, weight = torch.cat([part.wanted for part in block]), torch.cat([part.weight for part in block])
    return fused_rows(scores, teacher, wanted, weight, temperature)


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
