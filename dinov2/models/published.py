"""Weights in other people's key layouts, renamed to ours, which is the published DINOv2 one.

Three layouts are told apart by their keys: the published one (also inside a training checkpoint), timm's, and
transformers' Dinov2, Dinov2WithRegisters (the keys of its releases 4 and 5) and DINOv3ViT.
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
    (r"^embeddings\.patch_embeddings\.(weight|bias)$", r"patch_embed.proj.\1"),
    (r"^(encoder|model)\.layer\.", "blocks."),
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
    if any("layer_scale1.lambda1" in name for name in weights):
        return "transformers"
    return "published" if "mask_token" in weights else "timm"


def to_published(weights: Weights) -> Weights:
    """The same weights under the published names. What only training uses may be missing and becomes zero."""
    weights = CONVERSIONS[layout_of(weights)](weights)
    if "mask_token" not in weights and "cls_token" in weights:
        weights["mask_token"] = torch.zeros_like(weights["cls_token"][0])
    return weights


def position_convention(weights: Weights) -> str:
    """How the source of these weights resizes its position embedding; `rope` where it has none."""
    if not any("pos_embed" in name or "position_embeddings" in name for name in weights):
        return "rope"
    layout = layout_of(weights)
    if layout == "timm" or any(name.endswith("register_tokens") for name in weights):
        return "exact_antialias"
    return "exact" if layout == "transformers" else "release"


def _from_timm(weights: Weights) -> Weights:
    renamed = {}
    gated = any("mlp.fc1_g." in name for name in weights) or any(
        weights[name].shape[0] != weights[name.replace("fc1", "fc2")].shape[1]
        for name in weights
        if name.endswith("mlp.fc1.weight") and name.replace("fc1", "fc2") in weights
    )
    weights = _joined(weights, ("mlp.fc1_g", "mlp.fc1_x"), "mlp.fc1")  # DINOv3 keeps gate and value apart
    weights = _with_key_biases(weights, "attn.q_bias", "attn.v_bias", "attn.qkv.bias")
    for name, tensor in weights.items():
        if gated:
            name = name.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3.")
        name = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name)
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
    if any(name.endswith("mlp.up_proj.weight") for name in renamed) and not any(
        ".mlp.gate_proj." in name for name in renamed
    ):  # DINOv3 calls a plain MLP's layers what it calls a gated one's
        renamed = {
            name.replace(".mlp.up_proj.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): tensor
            for name, tensor in renamed.items()
        }
    if (mask := renamed.get("mask_token")) is not None:
        renamed["mask_token"] = mask.reshape(1, -1)
    if not any(name.endswith("attn.k.bias") for name in renamed):
        renamed = _with_key_biases(renamed, "attn.q.bias", "attn.v.bias", "attn.qkv.bias")
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


def _with_key_biases(weights: Weights, query: str, value: str, whole: str) -> Weights:
    """Biases of queries and values joined, with zeros for the keys, to which softmax is blind anyhow."""
    joined = dict(weights)
    for name in weights:
        if name.endswith(query):
            q, v = joined.pop(name), joined.pop(name.removesuffix(query) + value)
            joined[name.removesuffix(query) + whole] = torch.cat([q, torch.zeros_like(q), v])
    return joined


CONVERSIONS: dict[str, Callable[[Weights], Weights]] = {
    "published": dict,
    "timm": _from_timm,
    "transformers": _from_transformers,
}
