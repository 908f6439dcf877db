"""The cross-entropy of rows of scores and its gradient in one kernel, for CUDA (Triton).

Plain tensors pass a dozen times through [rows x prototypes] in float32. Here a row of scores is read twice
and written once, in the student's type, and targets exist in registers alone. The products before and after
stay with cuBLAS.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from dinov2.losses.targets import Targets

BLOCK = 4096  # prototypes at a time


def fused_rows(
    scores: Float[Tensor, "rows prototypes"],
    teacher: Targets,
    wanted: Int[Tensor, "rows 2"],
    weight: Float[Tensor, " rows"],
    temperature: float,
) -> Float[Tensor, ""]:
    """The weighted cross-entropy of rows; their scores give way to its gradient. Computed in float32.

    Args:
        scores: of the student, rows contiguous.
        wanted: samples of the teacher whose targets a row meets, the second -1 where it meets one.
        weight: of each row in the sum.
        temperature: the student's.
    """
    losses = torch.empty(len(scores), dtype=torch.float32, device=scores.device)
    _rows[(len(scores),)](
        scores,
        teacher.scores,
        teacher.columns.contiguous(),
        wanted.contiguous(),
        weight.contiguous(),
        losses,
        scores.shape[1],
        scores.stride(0),
        teacher.scores.stride(0),
        1 / temperature,
        1 / teacher.temperature,
        BLOCK=min(BLOCK, triton.next_power_of_2(scores.shape[1])),  # type: ignore[arg-type]  # a constant of the kernel
    )
    return losses.sum()


@triton.jit
def _read(row, at, inside):
    return tl.load(row + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _fold(top, total, mean, logits, values, inside):
    """More logits into a running maximum, and into sums of exp(logit - it) and of that times a value."""
    higher = tl.maximum(top, tl.max(tl.where(inside, logits, -float("inf"))))
    part = tl.where(inside, tl.exp(logits - higher), 0.0)
    shrink = tl.exp(top - higher)
    return higher, total * shrink + tl.sum(part), mean * shrink + tl.sum(part * values)


@triton.jit
def _rows(
    scores,
    teacher,
    columns,
    wanted,
    weight,
    losses,
    prototypes,
    stride,
    teacher_stride,
    sharp,
    teacher_sharp,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    second = tl.load(wanted + 2 * row + 1)
    both = tl.where(second < 0, 0.0, 1.0)
    own = scores + row * stride
    one = teacher + tl.load(wanted + 2 * row) * teacher_stride
    two = teacher + tl.where(second < 0, 0, second) * teacher_stride

    # log-sum-exps of the three, and the means of the student's scores under both targets, in one pass
    top, total = -float("inf"), 0.0
    top_one, total_one, mean_one = -float("inf"), 0.0, 0.0
    top_two, total_two, mean_two = -float("inf"), 0.0, 0.0
    for start in range(0, prototypes, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < prototypes
        column = _read(columns, at, inside)
        s = _read(own, at, inside) * sharp
        t_one = _read(one, at, inside) * teacher_sharp - column
        t_two = _read(two, at, inside) * teacher_sharp - column

        top, total, _ = _fold(top, total, 0.0, s, s, inside)
        top_one, total_one, mean_one = _fold(top_one, total_one, mean_one, t_one, s, inside)
        top_two, total_two, mean_two = _fold(top_two, total_two, mean_two, t_two, s, inside)

    w = tl.load(weight + row).to(tl.float32)
    log_all, log_one, log_two = top + tl.log(total), top_one + tl.log(total_one), top_two + tl.log(total_two)
    met = mean_one / total_one + both * (mean_two / total_two)
    tl.store(losses + row, w * ((1.0 + both) * log_all - met))

    for start in range(0, prototypes, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < prototypes
        column = _read(columns, at, inside)
        s = _read(own, at, inside) * sharp
        t_one = _read(one, at, inside) * teacher_sharp - column
        t_two = _read(two, at, inside) * teacher_sharp - column
        targets = tl.exp(t_one - log_one) + both * tl.exp(t_two - log_two)
        slope = (w * sharp) * ((1.0 + both) * tl.exp(s - log_all) - targets)
        tl.store(own + at, slope.to(scores.dtype.element_ty), mask=inside)
