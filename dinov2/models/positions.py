"""Learned position embeddings on any grid, by the three conventions that published weights were made with.

From a grid of 37 to one of 16 they differ by up to 0.06 where the embedding's standard deviation is 0.02,
so weights are only worth what their convention says:

release          bicubic by a scale factor of (size + 0.1) / old size, no antialiasing: the published models
                 without registers
exact            bicubic to the exact size, no antialiasing: transformers' Dinov2
exact_antialias  bicubic to the exact size, antialiased: timm, the published register models, and
                 transformers' Dinov2WithRegisters
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

RELEASE_OFFSET = 0.1  # the published code adds it against rounding, and so shifts every sample a little


def resized_positions(
    embedding: Float[Tensor, "1 positions dim"], grid: tuple[int, int], convention: str
) -> Float[Tensor, "1 patches dim"]:
    """The patches' part of a position embedding (a square grid) resized to (rows, columns), in float32."""
    old = round(embedding.shape[1] ** 0.5)
    if grid == (old, old):
        return embedding
    square = embedding.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    if convention == "release":
        scale = [(size + RELEASE_OFFSET) / old for size in grid]
        resized = F.interpolate(square, scale_factor=scale, mode="bicubic")
        if resized.shape[-2:] != grid:
            raise ValueError(f"the release convention cannot resize {old} x {old} positions to {grid}")
    else:
        antialias = convention == "exact_antialias"
        resized = F.interpolate(square, size=grid, mode="bicubic", antialias=antialias)
    return resized.flatten(2).transpose(1, 2)
