"""Weights in other people's key layouts, renamed to ours, which is the published DINOv2 one.

Three layouts are told apart by their keys: the published one (also inside a training checkpoint), timm's, and
transformers' Dinov2 and Dinov2WithRegisters (the keys of its releases 4 and 5).
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]

WRAPPERS = ("teacher", "model", "state_dict")  # where checkpoints keep the weights, the EMA teacher's first
IGNORED = re.compile(r"^(head|classifier|dino_head|ibot_head|linear_head)\.")  # not part of a backbone

TRANSFORMERS_NAMES = [
    (r"^(dinov2|dinov2_with_registers)\.", ""),
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\.", r".attn.\1."),
    (r"\.attention\.(q|k|v)_proj\.", r".attn.\1."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.(weights_out|down_proj)\.", ".mlp.w3."),
]


def unwrapped(checkpoint: Mapping[str, Any]) -> Weights:
    """A checkpoint's backbone tensors: out of their wrapper, without prefixes, heads and chunk numbers."""
    for name in WRAPPERS:
        if isinstance(inner := checkpoint.get(name), Mapping):
            return unwrapped(inner)
    weights = {}
    backbone_only = any(".backbone." in f".{name}" for name in checkpoint)
    for name, value in checkpoint.items():
        if not isinstance(value, Tensor) or (backbone_only and ".backbone." not in f".{name}"):
            continue
        name = re.sub(r"^(module\.)?(backbone\.)?", "", name)
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)  # blocks wrapped in chunks for training
        if not IGNORED.match(name):
            weights[name] = value
    return weights


def layout_of(weights: Weights) -> str:
    """Whose keys these are: published, timm or transformers."""
    if any("encoder.layer." in name for name in weights):
        return "transformers"
    return "published" if "mask_token" in weights else "timm"


def to_published(weights: Weights) -> Weights:
    """The same weights under the published names. What only training uses may be missing and becomes zero."""
    weights = CONVERSIONS[layout_of(weights)](weights)
    if "mask_token" not in weights and "cls_token" in weights:
        weights["mask_token"] = torch.zeros_like(weights["cls_token"][0])
    return weights


def position_convention(weights: Weights) -> str:
    """How the source of these weights resizes its position embedding."""
    layout = layout_of(weights)
    if layout == "timm" or any(name.endswith("register_tokens") for name in weights):
        return "exact_antialias"
    return "exact" if layout == "transformers" else "release"


def _from_timm(weights: Weights) -> Weights:
    renamed = {}
    gated = any(
        weights[name].shape[0] != weights[name.replace("fc1", "fc2")].shape[1]
        for name in weights
        if name.endswith("mlp.fc1.weight") and name.replace("fc1", "fc2") in weights
    )
    for name, tensor in weights.items():
        if gated:
            name = name.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3.")
        renamed["register_tokens" if name == "reg_token" else name] = tensor
    if "register_tokens" in renamed and "pos_embed" in renamed:
        # timm keeps no position for CLS where there are registers: it is part of the token already
        positions = renamed["pos_embed"]
        renamed["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    return renamed


def _from_transformers(weights: Weights) -> Weights:
    renamed = {}
    for name, tensor in weights.items():
        for pattern, replacement in TRANSFORMERS_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    renamed = _joined(renamed, ("attn.q", "attn.k", "attn.v"), "attn.qkv")
    return _joined(renamed, ("mlp.gate_proj", "mlp.up_proj"), "mlp.w12")


def _joined(weights: Weights, parts: tuple[str, ...], whole: str) -> Weights:
    """Linear layers that follow each other in `parts` put into one, wherever all of them are."""
    joined = dict(weights)
    for name in weights:
        siblings = [name.replace(f".{parts[0]}.", f".{part}.") for part in parts]
        if f".{parts[0]}." in name and all(sibling in weights for sibling in siblings):
            tensors = [joined.pop(sibling) for sibling in siblings]
            joined[name.replace(f".{parts[0]}.", f".{whole}.")] = torch.cat(tensors)
    return joined


CONVERSIONS: dict[str, Callable[[Weights], Weights]] = {
    "published": dict,
    "timm": _from_timm,
    "transformers": _from_transformers,
}
