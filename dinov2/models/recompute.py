"""Layers that keep less for the backward pass, or run as compiled code. Wrapped from outside, after sharding.

checkpointing=none       everything that the backward pass needs is kept
checkpointing=light      what norms and activations give is computed again from their inputs, which are kept
                         anyhow: a hundredth of the time, and a third less to keep; nothing else is touched
checkpointing=selective  results of linear layers and attention are kept; norms, activations, rotations and
                         scales are computed again, which costs little
checkpointing=full       a block's input alone is kept, and the block is computed again
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dinov2.exits import UserError

CHECKPOINTING = ("none", "light", "selective", "full")
Kept = Tensor | tuple[Callable[[Tensor], Tensor], Tensor]
CHEAP = (nn.LayerNorm, nn.GELU)
KEPT = (
    "aten.mm",
    "aten.addmm",
    "mkldnn._linear_pointwise",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "torch_attn._varlen_attn",
)


def checkpoint_layers(layers: Sequence[nn.Module], how: str) -> None:
    """Let each layer keep only what `how`, one of `CHECKPOINTING`, says.

    Raises:
        UserError: blocks are to be computed again, and the network has none.
    """
    if how == "none":
        return
    if not layers:
        raise UserError(f"model.checkpointing={how} needs a transformer's blocks; set it to none")
    if how == "light":
        for layer in layers:
            _lighten(layer)
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _kept_operators())
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, **options)


def compile_layers(layers: Iterable[nn.Module], **options: Any) -> None:
    """Compile each layer's forward for training; in evaluation, where sizes vary, it runs as it is.

    Args:
        options: of `torch.compile`.
    """
    for layer in layers:
        layer.forward = partial(
            _forward, layer, torch.compile(layer.forward, dynamic=False, **options), layer.forward
        )


def _forward(layer: nn.Module, compiled: Callable[..., Any], plain: Callable[..., Any], *args: Any) -> Any:
    return (compiled if layer.training else plain)(*args)


def _lighten(layer: nn.Module) -> None:
    again = _Again()
    cheap: list[nn.Module] = [each for each in layer.modules() if isinstance(each, CHEAP)]
    for module in cheap:
        module.forward = partial(again.made, module.forward)
    layer.forward = partial(again.forward, layer.forward)


class _Again:
    """Has autograd keep the inputs of cheap functions in the place of what they gave.

    Results are held until the layer's forward ends: until then an address means the same tensor.
    """

    def __init__(self) -> None:
        self.known: dict[int, tuple[Tensor, Callable[[Tensor], Tensor], Tensor]] = {}

    def made(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        given = function(x)
        if torch.is_grad_enabled():
            self.known[id(given)] = (given, function, x)
        return given

    def forward(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            try:
                return function(*args)
            finally:
                self.known.clear()

    def _pack(self, tensor: Tensor) -> Kept:
        if id(tensor) not in self.known:
            return tensor
        _, function, x = self.known[id(tensor)]
        return function, x.detach()


def _unpack(kept: Kept) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    function, x = kept
    with torch.no_grad():
        return function(x)


def _kept_operators() -> list[Any]:
    found = []
    for name in KEPT:
        namespace, _, operator = name.partition(".")
        packet = getattr(getattr(torch.ops, namespace), operator, None)  # a backend may not be there
        if packet is not None:
            found.append(packet.default)
    return found
