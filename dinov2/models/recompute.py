"""Layers that keep less for the backward pass, or run as compiled code. Wrapped from outside, after sharding.

checkpointing=none       everything that the backward pass needs is kept
checkpointing=selective  results of linear layers and attention are kept; norms, activations, rotations and
                         scales are computed again, which costs little
checkpointing=full       a block's input alone is kept, and the block is computed again
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dinov2.exits import UserError

CHECKPOINTING = ("none", "selective", "full")
KEPT = (
    "aten.mm",
    "aten.addmm",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "torch_attn._varlen_attn",
)


def checkpoint_layers(layers: Sequence[nn.Module], how: str) -> None:
    """Let each layer keep only what `how`, one of `CHECKPOINTING`, says.

    Raises:
        UserError: there is something to be saved, and the network has no layers to save it in.
    """
    if how == "none":
        return
    if not layers:
        raise UserError(f"model.checkpointing={how} needs a transformer's blocks; set it to none")
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


def _kept_operators() -> list[Any]:
    found = []
    for name in KEPT:
        namespace, _, operator = name.partition(".")
        packet = getattr(getattr(torch.ops, namespace), operator, None)  # a backend may not be there
        if packet is not None:
            found.append(packet.default)
    return found
