"""Attention over packed crops: one flat token sequence in which each crop sees only itself.

One function, three ways to compute it. They give the same numbers within rounding:

xformers  memory-efficient attention under a block-diagonal mask; CUDA, any floating type
varlen    torch's variable-length flash attention; CUDA from Ampere on, half precision
sdpa      torch's scaled dot-product attention, once per group of equal crops; any device. Short crops in half
          precision on a CPU are computed by plain matrix products instead
"""

import logging
from collections.abc import Callable
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dinov2.models.rope import Turns, turn

Groups = tuple[tuple[int, int], ...]  # (crops, tokens a crop), in the order of the sequence
Heads = Float[Tensor, "tokens heads head_dim"]

HALF = (torch.float16, torch.bfloat16)
SHORT = 512  # tokens of a crop up to which its attention weights may be held in memory

log = logging.getLogger(__name__)


def packed_attention(q: Heads, k: Heads, v: Heads, groups: Groups, backend: str) -> Heads:
    """Softmax attention of every crop's tokens to those of the same crop.

    Args:
        q, k, v: all crops' tokens one after the other; slices of one projection are fine, nothing is copied.
        groups: how the sequence is made up; the tokens add up to its length.
        backend: a key of `BACKENDS`.
    """
    return BACKENDS[backend](q, k, v, groups)


def _sdpa(q: Heads, k: Heads, v: Heads, groups: Groups) -> Heads:
    if q.device.type == "cpu" and q.dtype in HALF and max(length for _, length in groups) <= SHORT:
        # torch's half-precision CPU kernel is no more exact, and takes 2 (257 tokens) to 4 times (69) as long
        return _Products.apply(q, k, v, groups)  # type: ignore[return-value]  # apply is untyped
    sizes = [count * length for count, length in groups]
    # split, not slices: its backward is one concatenation instead of a zero-filled whole per group
    parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), groups, strict=True)
    outputs = [_sdpa_equal(*part) for part in parts]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _sdpa_equal(q: Heads, k: Heads, v: Heads, group: tuple[int, int]) -> Heads:
    q, k, v = (part.unflatten(0, group).transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


class _Products(torch.autograd.Function):
    """Attention by plain matrix products. By hand, so that a tensor is laid out anew once, not thrice."""

    @staticmethod
    def forward(ctx: Any, q: Heads, k: Heads, v: Heads, groups: Groups) -> Heads:
        output, saved, scale = q.new_empty(q.shape), [], q.shape[-1] ** -0.5
        sizes = [count * length for count, length in groups]
        for group, own, *parts in zip(groups, *(x.split(sizes) for x in (output, q, k, v)), strict=True):
            q, k, v = (_by_head(part, group) for part in parts)
            weights = _product(q, k.mT, scale).softmax(dim=-1)
            _back(weights @ v, group, own)
            saved += [q, k, v, weights]
        ctx.save_for_backward(*saved)
        ctx.groups = groups
        return output

    @staticmethod
    def backward(ctx: Any, grad: Heads) -> tuple[Heads | None, ...]:  # type: ignore[override]  # one output
        found = [grad.new_empty(grad.shape) for _ in range(3)]
        saved, scale = iter(ctx.saved_tensors), grad.shape[-1] ** -0.5
        sizes = [count * length for count, length in ctx.groups]
        parts = zip(ctx.groups, *(x.split(sizes) for x in (grad, *found)), strict=True)
        for group, upstream, to_q, to_k, to_v in parts:
            q, k, v, weights = (next(saved) for _ in range(4))
            upstream = _by_head(upstream, group)
            to_scores = torch.ops.aten._softmax_backward_data(upstream @ v.mT, weights, -1, weights.dtype)
            _back(_product(to_scores, k, scale), group, to_q)
            _back(_product(to_scores.mT, q, scale), group, to_k)
            _back(weights.mT @ upstream, group, to_v)
        return *found, None


def _by_head(x: Heads, group: tuple[int, int]) -> Float[Tensor, "crops*heads tokens head_dim"]:
    return x.unflatten(0, group).transpose(1, 2).flatten(0, 1)


def _back(x: Float[Tensor, "crops*heads tokens head_dim"], group: tuple[int, int], target: Heads) -> None:
    target.unflatten(0, group).copy_(x.unflatten(0, (group[0], -1)).transpose(1, 2))


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Scaled on the way."""
    return torch.baddbmm(left.new_empty(1), left, right, beta=0, alpha=scale)


def _varlen(q: Heads, k: Heads, v: Heads, groups: Groups) -> Heads:
    from torch.nn.attention.varlen import varlen_attn

    starts = _crop_starts(groups, q.device)
    longest = max(length for _, length in groups)
    output = varlen_attn(q, k, v, starts, starts, longest, longest)
    assert isinstance(output, Tensor)  # a pair only where the log-sum-exp is asked for
    return output


def _xformers(q: Heads, k: Heads, v: Heads, groups: Groups) -> Heads:
    from xformers.ops import memory_efficient_attention  # pyright: ignore  # of the extra gpu

    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=_block_mask(groups, q.device))[0]


BACKENDS: dict[str, Callable[[Heads, Heads, Heads, Groups], Heads]] = {
    "xformers": _xformers,
    "varlen": _varlen,
    "sdpa": _sdpa,
}


@lru_cache(maxsize=64)
def _crop_starts(groups: Groups, device: torch.device) -> Int[Tensor, " starts"]:
    """Where each crop starts, and the end. Kept: a copy to the device in every block would wait for it."""
    lengths = torch.tensor([0, *(length for count, length in groups for _ in range(count))])
    return lengths.cumsum(0).to(device, torch.int32)


@lru_cache(maxsize=64)
def _block_mask(groups: Groups, device: torch.device) -> object:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask  # pyright: ignore  # of the extra gpu

    lengths = [length for count, length in groups for _ in range(count)]
    return BlockDiagonalMask.from_seqlens(lengths, device=device)


def available_backends(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The keys of `BACKENDS` that work there, best first."""
    names = []
    if device.type == "cuda":
        if find_spec("xformers") is not None:
            names.append("xformers")
        if dtype in HALF and _has_varlen() and torch.cuda.get_device_capability(device) >= (8, 0):
            names.append("varlen")
    return [*names, "sdpa"]


@cache
def choose_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The best backend for tensors of this kind. The choice is logged, once."""
    name = available_backends(device, dtype)[0]
    log.info("attention over packed crops: %s (%s, %s)", name, device, dtype)
    return name


def _has_varlen() -> bool:
    try:
        return find_spec("torch.nn.attention.varlen") is not None
    except ModuleNotFoundError:
        return False


class Attention(nn.Module):
    """Multi-head self-attention on a packed sequence."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "tokens dim"], groups: Groups, backend: str, turns: Turns | None = None
    ) -> Float[Tensor, "tokens dim"]:
        return self.proj(self.mixed(x, groups, backend, turns))

    def mixed(
        self, x: Float[Tensor, "tokens dim"], groups: Groups, backend: str, turns: Turns | None = None
    ) -> Float[Tensor, "tokens dim"]:
        """All heads' output, before the projection."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        if turns is not None:
            q, k = turn(q, turns), turn(k, turns)
        return packed_attention(q, k, v, groups, backend).flatten(-2)
