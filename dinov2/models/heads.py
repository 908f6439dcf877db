"""The projection head of DINO and iBOT: tokens to scores against prototypes."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dinov2.models.initial import init_own

SHORTEST = 1e-6  # what rows are at least divided by
ROWS = 2**12  # at a time: what stays in a cache


class DINOHead(nn.Module):
    """MLP with GELU, L2 normalisation, bias-free weight-normalised linear layer (DINO sec. 3.1, app. C).

    `bottleneck(x)` stops before the prototypes; `prototypes(y)` goes on from there, `prototypes.directions()`
    are its effective weights. Both compute in the autocast type where autocast is on.
    """

    def __init__(
        self,
        in_dim: int,
        hidden: int = 2048,
        bottleneck: int = 256,
        prototypes: int = 65_536,
        layers: int = 3,
        norm_last: bool = True,
        batch_norm: bool = False,
        weight_norm: bool = True,
    ) -> None:
        """Args:
        layers: linear layers of the MLP, at least 1.
        norm_last: prototypes have unit length. False gives each a learned length (DINO for ViT-S).
        batch_norm: batch norm before each GELU (DINO's ablation).
        weight_norm: False makes the last layer a plain linear one (DINOv3).
        """
        super().__init__()
        widths = [in_dim, *[hidden] * (layers - 1), bottleneck]
        modules: list[nn.Module] = []
        for before, after in pairwise(widths):
            modules += [nn.Linear(before, after), *([nn.BatchNorm1d(after)] if batch_norm else []), nn.GELU()]
        self.mlp = nn.Sequential(*modules[: -2 if batch_norm else -1])
        lengths = ("unit" if norm_last else "learned") if weight_norm else "free"
        self.prototypes = Prototypes(bottleneck, prototypes, lengths)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Truncated normals of 0.02, biases 0; see `Prototypes` for the last layer."""
        if not self.prototypes.weight.is_meta:
            for module in self.modules():
                init_own(module, generator)

    def bottleneck(self, x: Float[Tensor, "tokens in_dim"]) -> Float[Tensor, "tokens bottleneck"]:
        """L2-normalised, in the type that the MLP computes in."""
        return unit_rows(self.mlp(x))

    def forward(self, x: Float[Tensor, "tokens in_dim"]) -> Float[Tensor, "tokens prototypes"]:
        return self.prototypes(self.bottleneck(x))


class Prototypes(nn.Module):
    """A bias-free linear layer. Its rows have unit length (DINO), learned lengths, or are free (DINOv3)."""

    def __init__(self, dim: int, count: int, lengths: str = "unit") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, dim))
        self.length = nn.Parameter(torch.empty(count)) if lengths == "learned" else None
        self.free = lengths == "free"

    def init_own(self, generator: torch.Generator | None = None) -> None:
        """Rows of length one; free ones too (ours: the paper says nothing), so that all kinds start alike."""
        nn.init.trunc_normal_(self.weight, std=0.02, generator=generator)
        if self.free:
            self.weight.copy_(unit_rows(self.weight))
        if self.length is not None:
            nn.init.ones_(self.length)

    def directions(self) -> Float[Tensor, "prototypes dim"]:
        """The effective weights."""
        if self.free:
            return self.weight
        rows = unit_rows(self.weight)
        return rows if self.length is None else rows * self.length[:, None]

    def forward(self, x: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens prototypes"]:
        return F.linear(x, self.directions())


def unit_rows(x: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
    """Rows divided by their length, in the same type; shorter ones than 1e-6 are divided by that.

    Computed in float32 at least: in half precision a sum of squares overflows at 65,504, and 1e-6 is nothing.
    """
    wide = x if x.dtype.itemsize >= 4 else x.float()
    unit: Tensor = _Unit.apply(wide)  # type: ignore[assignment]  # apply is untyped
    return unit.to(x.dtype)


class _Unit(torch.autograd.Function):
    """Normalised rows. The automatic gradient takes a dozen passes through the weights of many prototypes."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=SHORTEST)
        unit = x / length
        ctx.save_for_backward(unit, length)
        return unit

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]  # one output
        unit, length = ctx.saved_tensors
        found = torch.empty_like(unit)
        for own, g, u, long in zip(*(x.split(ROWS) for x in (found, grad, unit, length)), strict=True):
            along = torch.linalg.vecdot(g, u)[..., None]
            along = torch.where(long > SHORTEST, along, 0.0)  # what is divided by a constant passes whole
            torch.addcmul(g, u, along, value=-1, out=own).div_(long)
        return found
