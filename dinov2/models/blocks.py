"""Transformer blocks on packed sequences, with stochastic depth that leaves work out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dinov2.models.attention import Attention, Groups
from dinov2.models.config import ViTConfig
from dinov2.models.rope import Turns

Tokens = Float[Tensor, "tokens dim"]


class Subset(NamedTuple):
    """The crops whose residual branch is computed (stochastic depth), as tokens of the whole sequence."""

    groups: Groups
    tokens: tuple[Int[Tensor, " kept"], ...]  # for each group
    scales: tuple[float, ...]  # crops / kept crops, for each group

    def flat(self) -> Int[Tensor, " kept"]:
        """The tokens of all groups."""
        return self.tokens[0] if len(self.tokens) == 1 else torch.cat(self.tokens)

    def factors(self, dtype: torch.dtype) -> Float[Tensor, "kept 1"]:
        """Each token's scale."""
        pairs = zip(self.tokens, self.scales, strict=True)
        return torch.cat([torch.full_like(own, scale, dtype=dtype) for own, scale in pairs])[:, None]


class Keep(NamedTuple):
    """The subsets of one block: attention and feed-forward draw separately. None keeps everything."""

    attention: Subset | None = None
    ffn: Subset | None = None


def draw_depth(
    groups: Groups, rate: float, depth: int, device: torch.device, generator: torch.Generator | None = None
) -> list[Keep]:
    """Draw which crops go through each branch of each block (DINOv2 sec. 5: efficient stochastic depth).

    In every group max(1, round(count x (1 - rate))) crops are kept, so shapes do not depend on the draw.
    All is drawn at once and from `generator`: a step's draws are reproducible, and a block that is computed
    again in the backward pass (activation checkpointing) meets the same ones.
    """
    drawn = []
    start = 0
    for count, length in groups:
        kept = kept_crops(count, rate)
        where = generator.device if generator is not None else "cpu"
        order = torch.rand(2 * depth, count, generator=generator, device=where).argsort(dim=1)
        crops = order[:, :kept].sort(dim=1).values.to(device, non_blocking=True)
        inside = torch.arange(length, device=device)
        drawn.append((start + crops[..., None] * length + inside).flatten(1))
        start += count * length
    kept_groups = tuple((kept_crops(count, rate), length) for count, length in groups)
    scales = tuple(count / kept for (count, _), (kept, _) in zip(groups, kept_groups, strict=True))
    subsets = [Subset(kept_groups, tokens, scales) for tokens in zip(*drawn, strict=True)]
    return [Keep(*pair) for pair in zip(subsets[0::2], subsets[1::2], strict=True)]


def kept_crops(count: int, rate: float) -> int:
    """How many of `count` crops stochastic depth leaves."""
    return max(1, round(count * (1 - rate)))


def whole(groups: Groups, device: torch.device) -> Subset:
    """All crops as a subset."""
    sizes = [count * length for count, length in groups]
    return Subset(groups, torch.arange(sum(sizes), device=device).split(sizes), (1.0,) * len(groups))


def add_branch(
    x: Tokens,
    branch: Callable[[Tokens, Groups], Tokens],
    groups: Groups,
    subset: Subset | None,
    gamma: Float[Tensor, " dim"] | None = None,
) -> Tokens:
    """x + gamma * branch(x), the branch for the subset's crops alone, scaled to keep the expectation."""
    if subset is None:
        return added(x, branch(x, groups), gamma)
    tokens = subset.flat()
    x, seen = _Taken.apply(x, tokens)  # type: ignore[misc]  # apply is untyped
    return added(x, branch(seen, subset.groups), gamma, tokens, subset.factors(x.dtype))


def added(
    x: Tokens,
    update: Float[Tensor, "some dim"],
    gamma: Float[Tensor, " dim"] | None,
    tokens: Int[Tensor, " some"] | None = None,
    factors: Float[Tensor, "some 1"] | None = None,
) -> Tokens:
    """x + factors * gamma * update at these tokens, each once, or at all; in the type of x."""
    return _Added.apply(x, update, gamma, tokens, factors)  # type: ignore[return-value]  # apply is untyped


class _Taken(torch.autograd.Function):
    """A sequence, and some of its tokens. By hand, since their gradient then needs no tensor of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tokens, tokens: Int[Tensor, " some"]) -> tuple[Tokens, Tokens]:
        ctx.save_for_backward(tokens)
        return x.view_as(x), x.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tokens, of_some: Tokens) -> tuple[Tokens, None]:  # type: ignore[override]  # two outputs
        (tokens,) = ctx.saved_tensors
        return grad.index_add(0, tokens, of_some), None


class _Added(torch.autograd.Function):
    """What `added` gives. By hand, since operators on two types at once take three times as long on a CPU."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tokens,
        update: Tokens,
        gamma: Tensor | None,
        tokens: Tensor | None,
        factors: Tensor | None,
    ) -> Tokens:
        ctx.save_for_backward(update, gamma, tokens, factors)
        scaled = update.to(x.dtype, copy=True)
        for factor in (gamma, factors):
            if factor is not None:
                scaled.mul_(factor)
        return scaled.add_(x) if tokens is None else x.index_add(0, tokens, scaled)

    @staticmethod
    def backward(ctx: Any, grad: Tokens) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # one output
        update, gamma, tokens, factors = ctx.saved_tensors
        own = grad if tokens is None else grad.index_select(0, tokens)
        if factors is not None:
            own = own * factors
        if gamma is None:
            return grad, own.to(update.dtype), None, None, None
        to_gamma = update.to(own.dtype, copy=True).mul_(own).sum(dim=0).to(gamma.dtype)
        return grad, (own * gamma).to(update.dtype), to_gamma, None, None


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch (CaiT, arXiv 2103.17239)."""

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.value = value
        self.gamma = nn.Parameter(torch.full((dim,), value))

    def init_own(self, generator: torch.Generator | None = None) -> None:
        nn.init.constant_(self.gamma, self.value)

    def forward(self, x: Tokens) -> Tokens:
        return x * self.gamma


class Norm(nn.LayerNorm):
    """Layer norm in the type of its input, whatever its own weights were gathered in."""

    def forward(self, input: Tokens) -> Tokens:
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tokens) -> Tokens:
        return self.fc2(self.act(self.fc1(x)))


class SwiGLU(nn.Module):
    """Gated feed-forward layer (arXiv 2002.05202); gate and value are one projection, as published."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tokens) -> Tokens:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    """Attention and a feed-forward layer, each a normalised, scaled residual branch."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.norm1 = Norm(dim, eps=config.norm_eps)
        self.attn = Attention(dim, config.heads, config.qkv_bias)
        self.ls1 = LayerScale(dim, config.layer_scale) if config.layer_scale else nn.Identity()
        self.norm2 = Norm(dim, eps=config.norm_eps)
        self.mlp = MLP(dim, config.hidden) if config.ffn == "mlp" else SwiGLU(dim, config.hidden)
        self.ls2 = LayerScale(dim, config.layer_scale) if config.layer_scale else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "... dim"],
        groups: Groups | None = None,
        backend: str = "sdpa",
        keep: Keep | None = None,
        turns: Turns | None = None,
        wanted: Bool[Tensor, " tokens"] | None = None,
    ) -> Float[Tensor, "... dim"]:
        """A packed sequence [tokens, dim] made up as `groups` say, or a plain batch [crops, tokens, dim].

        Args:
            keep: what stochastic depth leaves; None is everything.
            turns: rotary positions of the sequence's tokens, if there are any.
            wanted: the tokens that go through all of the block; others serve their attention, and leave as
                they came.
        """
        if groups is None:  # code written for the published blocks hands over a batch
            return self(x.flatten(0, 1), (tuple(x.shape[:2]),), backend, keep, turns).view_as(x)
        keep = keep or Keep()
        if turns is not None and keep.attention is not None:
            turns = turns.of(keep.attention.flat())
        if wanted is not None:
            return self._finish(x, groups, backend, keep, turns, wanted)

        def attend(x: Tokens, groups: Groups) -> Tokens:
            return self.attn(self.norm1(x), groups, backend, turns)

        def feed(x: Tokens, groups: Groups) -> Tokens:
            return self.mlp(self.norm2(x))

        x = add_branch(x, attend, groups, keep.attention, getattr(self.ls1, "gamma", None))
        return add_branch(x, feed, groups, keep.ffn, getattr(self.ls2, "gamma", None))

    def _finish(
        self,
        x: Tokens,
        groups: Groups,
        backend: str,
        keep: Keep,
        turns: Turns | None,
        wanted: Bool[Tensor, " tokens"],
    ) -> Tokens:
        """What a token needs beyond attention, for the wanted ones alone."""
        subset = keep.attention or whole(groups, x.device)
        tokens = subset.flat()
        seen = x if keep.attention is None else x.index_select(0, tokens)
        mixed = self.attn.mixed(self.norm1(seen), subset.groups, backend, turns)
        inside = wanted[tokens].nonzero().squeeze(1)
        update = self.attn.proj(mixed.index_select(0, inside))
        factors = subset.factors(x.dtype)[inside]
        x = added(x, update, getattr(self.ls1, "gamma", None), tokens[inside], factors)

        subset = keep.ffn or whole(groups, x.device)
        tokens = subset.flat()
        inside = wanted[tokens].nonzero().squeeze(1)
        update = self.mlp(self.norm2(x.index_select(0, tokens[inside])))
        factors = subset.factors(x.dtype)[inside]
        return added(x, update, getattr(self.ls2, "gamma", None), tokens[inside], factors)
