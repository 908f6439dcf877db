"""Linear layers in float32 on a CPU by oneDNN. Wrapped from outside.

torch's own call there, a product with the bias as its starting value, takes up to a third longer than the
product alone; oneDNN's adds the bias on the way, and is faster in the product as well. In half precision
torch calls oneDNN by itself.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def has_onednn() -> bool:
    """Whether this torch has oneDNN's linear layer."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def use_onednn(network: nn.Module) -> None:
    """Compute all linear layers of a network by oneDNN, in float32; otherwise as before."""
    if not has_onednn():
        return
    layers: list[Any] = [each for each in network.modules() if type(each) is nn.Linear]
    for layer in layers:
        layer.forward = partial(linear, layer)


def linear(layer: nn.Linear, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
    """What the layer gives."""
    narrow = torch.is_autocast_enabled(x.device.type) or x.dtype != torch.float32
    if narrow or x.device.type != "cpu" or x.numel() == 0:
        return F.linear(x, layer.weight, layer.bias)
    found: Tensor = _Linear.apply(x.flatten(0, -2), layer.weight, layer.bias)  # type: ignore[assignment]  # apply is untyped
    return found.view(*x.shape[:-1], -1)


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
            _product(grad, weight.T, None) if to_x else None,
            grad.T @ x if to_weight else None,  # torch's own is the faster one here
            grad.sum(dim=0) if to_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
