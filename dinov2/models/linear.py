"""Linear layers on a CPU by oneDNN, called directly. Wrapped from outside.

torch's own call writes the bias as a starting value and adds the product to it; oneDNN's adds the bias on the
way. In float32 that takes up to a third off, where the product is faster as well; in bfloat16, whose products
torch has from oneDNN anyhow, a tenth, to the same bits.
"""

from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def has_onednn() -> bool:
    """Whether this torch has oneDNN's linear layer."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def use_onednn(network: nn.Module) -> None:
    """Compute all linear layers of a network by oneDNN, where it has the type."""
    if not has_onednn():
        return
    layers: list[Any] = [each for each in network.modules() if type(each) is nn.Linear]
    for layer in layers:
        layer.forward = partial(linear, layer)


def linear(layer: nn.Linear, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
    """What the layer gives."""
    kind, weight, bias = x.device.type, layer.weight, layer.bias
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if kind != "cpu" or x.numel() == 0 or not _has(dtype):
        return F.linear(x, weight, bias)
    rows = x.to(dtype).flatten(0, -2)
    found: Tensor = _Linear.apply(rows, weight.to(dtype), None if bias is None else bias.to(dtype))  # type: ignore[assignment]  # apply is untyped
    return found if x.ndim == 2 else found.view(*x.shape[:-1], -1)


@cache
def _has(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # one output
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return (
            _to_input(grad, weight) if to_x else None,
            grad.T @ x if to_weight else None,  # torch's own is the faster one here
            grad.sum(dim=0) if to_bias else None,
        )


def _to_input(grad: Tensor, weight: Tensor) -> Tensor:
    return grad @ weight if grad.dtype == torch.bfloat16 else _product(grad, weight.T, None)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
