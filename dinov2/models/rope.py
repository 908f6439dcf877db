"""Axial rotary positions (DINOv3, arXiv 2508.10104, sec. 3.2; RoFormer, arXiv 2104.09864).

Queries and keys of a patch are turned by angles proportional to where it lies: half of the pairs of channels
by its row, half by its column, from -1 to 1 between the edges of the crop whatever its size. CLS and the
registers lie nowhere and are not turned. In training the box of coordinates may be shifted, stretched along
each axis and rescaled, the same for all layers and crops of a step on a rank.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dinov2.models.config import ViTConfig

Box = Float[Tensor, "two axes"]  # shift and scale of the coordinates of rows and columns


class Turns(NamedTuple):
    """Cosine and sine of every token's angle for every pair of channels of a head."""

    cos: Float[Tensor, "tokens pairs"]
    sin: Float[Tensor, "tokens pairs"]

    def of(self, tokens: Tensor) -> "Turns":
        """Those of some tokens."""
        return Turns(self.cos.index_select(0, tokens), self.sin.index_select(0, tokens))


def draw_box(config: ViTConfig, device: torch.device, generator: torch.Generator | None = None) -> Box:
    """A step's shift, uniform, and scale, uniform in the logarithm: jitter of each axis, rescale of both."""
    where = generator.device if generator is not None else "cpu"
    drawn = 2 * torch.rand(5, generator=generator, device=where) - 1
    shift = config.rope_shift * drawn[:2]
    scale = math.log(config.rope_jitter) * drawn[2:4] + math.log(config.rope_rescale) * drawn[4]
    return torch.stack([shift, scale.exp()]).to(device, non_blocking=True)


def angles(
    grid: tuple[int, int], config: ViTConfig, device: torch.device, box: Box | None = None
) -> Float[Tensor, "patches pairs"]:
    """Of patches row by row on a grid of (rows, columns): 2 pi x coordinate / period, rows' angles first."""
    axes = [(torch.arange(count, device=device) + 0.5) / count * 2 - 1 for count in grid]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
    if box is not None:
        places = (places + box[0]) * box[1]
    count = config.dim // config.heads // 4
    periods = config.rope_base ** (torch.arange(count, device=device) / count)
    return (2 * math.pi * places[:, :, None] / periods).flatten(1)


def packed_turns(
    grids: list[tuple[int, int]], counts: list[int], config: ViTConfig, device: torch.device, box: Box | None
) -> Turns:
    """For the packed sequence of `counts` crops of each grid, every crop led by CLS and registers."""
    still = torch.zeros(1 + config.registers, config.dim // config.heads // 2, device=device)
    parts = [
        torch.cat([still, angles(grid, config, device, box)]).repeat(count, 1)
        for grid, count in zip(grids, counts, strict=True)
    ]
    together = torch.cat(parts)
    return Turns(together.cos(), together.sin())


def turn(x: Float[Tensor, "tokens heads head_dim"], turns: Turns) -> Float[Tensor, "tokens heads head_dim"]:
    """Channel i and channel i + head_dim / 2 as a point in the plane, turned; in float32 at least."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = turns.cos[:, None], turns.sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
