"""The two self-distillation losses: DINO between crops of an image, iBOT at masked patches."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

STUDENT_TEMPERATURE = 0.1


def dino(
    student: Float[Tensor, "crops*batch prototypes"],
    teacher: Float[Tensor, "2*batch prototypes"],
    *,
    temperature: float = STUDENT_TEMPERATURE,
) -> Float[Tensor, ""]:
    """Every teacher view against every other crop of the same image (DINO eq. 3).

    Crops are stacked crop by crop: all first views of the batch, all second views, then each local crop.

    Args:
        student: scores of the two global crops, then of the local ones (possibly none).
        teacher: targets of the two global crops; rows sum to one.

    Returns:
        Mean over the batch, divided by the number of terms, 2 * local crops + 2.
    """
    first, second = teacher.chunk(2)
    batch = first.shape[0]
    crops = student.shape[0] // batch
    if crops == 1 or student.shape[0] % batch:
        raise ValueError(f"{student.shape[0]} student rows are not whole crops of a batch of {batch}")
    locals_ = crops - 2
    # Cross-entropy is linear in the target, so a crop meets the sum of all its targets at once.
    targets = torch.cat([second, first, *[first + second] * locals_])
    total = _cross_entropy(
        student, targets, temperature, weight=_target_counts(batch, locals_, student.device)
    )
    return total.sum() / (batch * (2 * locals_ + 2))


def ibot(
    student: Float[Tensor, "masked prototypes"],
    teacher: Float[Tensor, "masked prototypes"],
    crop: Int[Tensor, " masked"],
    crops: int,
    *,
    temperature: float = STUDENT_TEMPERATURE,
) -> Float[Tensor, ""]:
    """The teacher's patch targets predicted at masked patches (iBOT eq. 2).

    Args:
        student, teacher: scores and targets (rows sum to one) of the masked patches; possibly none.
        crop: which global crop each masked patch lies in.
        crops: the number of global crops, masked or not, that the sum is divided by.

    Returns:
        Sum over crops of the mean cross-entropy over a crop's masked patches, divided by `crops`.
    """
    if student.shape[0] == 0:
        return student.sum()  # zero, and part of the graph: every rank has the same backward
    masked = torch.zeros(crops, device=student.device).index_add(
        0, crop, torch.ones(crop.shape[0], device=student.device)
    )
    losses = _cross_entropy(student, teacher, temperature)
    return (losses / masked[crop]).sum() / crops


def _cross_entropy(
    scores: Float[Tensor, "rows prototypes"],
    targets: Float[Tensor, "rows prototypes"],
    temperature: float,
    weight: Float[Tensor, " rows"] | float = 1.0,
) -> Float[Tensor, " rows"]:
    """-sum of target * log softmax(scores / temperature), a row of targets summing to `weight`; float32."""
    logits = scores.float() / temperature
    return weight * torch.logsumexp(logits, dim=1) - torch.linalg.vecdot(targets, logits)


def _target_counts(batch: int, locals_: int, device: torch.device) -> Float[Tensor, " rows"]:
    counts = torch.ones(2 + locals_, device=device)
    counts[2:] = 2.0
    return counts.repeat_interleave(batch)
