"""Gram anchoring: patches keep the likenesses among each other that they had for an earlier teacher."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def gram(
    student: Float[Tensor, "crops patches dim"], anchor: Float[Tensor, "crops patches other"]
) -> Float[Tensor, ""]:
    """Mean squared difference of the Gram matrices of L2-normalised patches (DINOv3 sec. 4.2, eq. 2).

    Each crop by itself: cosines of all pairs of its patches. The paper's squared Frobenius norm divided by
    the number of entries, so that it depends on neither the size of crops nor their number. In float32 at
    least. No gradient reaches the anchor, whose features may be of another width.
    """
    with torch.autocast(student.device.type, enabled=False):
        own, wanted = (_cosines(patches) for patches in (student, anchor.detach()))
        return (own - wanted).square().mean()


def downsampled(
    patches: Float[Tensor, "crops patches dim"], grid: tuple[int, int], onto: tuple[int, int]
) -> Float[Tensor, "crops fewer dim"]:
    """Features of a grid of (rows, columns) on a smaller one, bicubic, antialiased (DINOv3 sec. 4.3)."""
    if grid == onto:
        return patches
    maps = patches.float().transpose(1, 2).unflatten(2, grid)
    return functional.interpolate(maps, size=onto, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)


def _cosines(patches: Float[Tensor, "crops patches dim"]) -> Float[Tensor, "crops patches patches"]:
    wide = patches if patches.dtype == torch.float64 else patches.float()
    unit = functional.normalize(wide, dim=-1)
    return unit @ unit.transpose(-1, -2)
