"""Pictures of what a backbone sees: attention maps of the CLS token, and patch tokens as colours."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dinov2.exits import UserError
from dinov2.features.embedder import as_tensor
from dinov2.models.backbone import Backbone
from dinov2.models.timm_backbone import TimmBackbone
from dinov2.models.vit import VisionTransformer

Grid = tuple[int, int]


@torch.no_grad()
def attention(
    backbone: Backbone, image: Image.Image, *, size: int | None = None
) -> Float[Tensor, "heads rows columns"]:
    """How much of each head's attention the last block's CLS token gives to each patch (DINO, sec. 4.2.2).

    Args:
        size: pixels of the short side as the backbone sees it; by default what it was made for.

    Raises:
        UserError: the backbone is no vision transformer whose attention can be read.
    """
    if not isinstance(backbone, VisionTransformer | TimmBackbone):
        raise UserError(f"attention maps need a vision transformer, not a {type(backbone).__name__}")
    pixels, (rows, columns) = _seen(backbone, image, size)
    weights = backbone.get_last_selfattention(pixels)
    first = 1 + backbone.num_register_tokens
    return weights[0, :, 0, first:].reshape(-1, rows, columns).float()


def attention_maps(
    backbone: Backbone,
    image: Image.Image,
    *,
    size: int | None = None,
    mass: float | None = None,
    mean: bool = False,
) -> list[Image.Image]:
    """`attention` as pictures, one a head, as large as the image, each scaled to its own maximum.

    Args:
        mass: show only the patches that hold this share of the attention (DINO shows 0.6).
        mean: one picture, of the mean over the heads.
    """
    maps = attention(backbone, image, size=size)
    if mean:
        maps = maps.mean(dim=0, keepdim=True)
    if mass is not None:
        maps = maps * most_attended(maps, mass)
    maps = maps / maps.amax(dim=(1, 2), keepdim=True)
    return [_coloured(one.cpu().numpy()).resize(image.size, Image.Resampling.NEAREST) for one in maps]


def most_attended(
    maps: Float[Tensor, "heads rows columns"], mass: float
) -> Float[Tensor, "heads rows columns"]:
    """1 for the fewest patches that together hold at least this share of a head's attention to patches."""
    flat = maps.flatten(1)
    shares, order = (flat / flat.sum(1, keepdim=True)).sort(dim=1, descending=True)
    kept = (shares.cumsum(1) - shares < mass).to(flat.dtype)
    return torch.zeros_like(flat).scatter_(1, order, kept).view_as(maps)


@torch.no_grad()
def patch_colours(
    backbone: Backbone, images: Sequence[Image.Image], *, size: int | None = None, foreground: bool = False
) -> list[Image.Image]:
    """The first three principal components of the patch tokens as red, green and blue.

    The components are of all images together, so that equal colours mean similar patches across them.

    Args:
        size: pixels of the short side as the backbone sees it; by default what it was made for.
        foreground: only the patches on one side of the first component, and the components of those
            (DINOv2, sec. 7.5): the side that is rarer along the pictures' borders. The rest is black.
    """
    tokens, grids = [], []
    for image in images:
        pixels, grid = _seen(backbone, image, size)
        tokens.append(backbone.forward_features(pixels)["x_norm_patchtokens"][0].double().cpu())
        grids.append(grid)
    every = torch.cat(tokens)
    shown = _in_front(every, grids) if foreground else torch.ones(len(every), dtype=torch.bool)
    colours = torch.zeros(len(every), 3, dtype=torch.float64)
    colours[shown] = _spread(_components(every[shown], 3))
    parts = colours.split([rows * columns for rows, columns in grids])
    return [
        _picture(part.view(*grid, 3).numpy()).resize(image.size, Image.Resampling.NEAREST)
        for part, grid, image in zip(parts, grids, images, strict=True)
    ]


def _seen(backbone: Backbone, image: Image.Image, size: int | None) -> tuple[Tensor, Grid]:
    """The image as the backbone's input, whole, its sides rounded to patches; and the grid of patches."""
    patch = backbone.patch_size
    scale = (size or backbone.image_size) / min(image.size)
    columns, rows = (max(1, round(side * scale / patch)) for side in image.size)
    resized = image.convert("RGB").resize((columns * patch, rows * patch), Image.Resampling.BICUBIC)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in backbone.normalisation)
    device = next(backbone.parameters()).device
    return ((as_tensor(resized) / 255 - mean) / std)[None].to(device), (rows, columns)


def _components(rows: Float[Tensor, "n dim"], count: int) -> Float[Tensor, "n count"]:
    """Projections on the first principal components, each turned so that its longest entry is positive."""
    centred = rows - rows.mean(0)
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -count:].flip(1)
    longest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return centred @ (directions * longest.sign())


def _in_front(every: Tensor, grids: Sequence[Grid]) -> Tensor:
    """The patches on the side of the first component that is the smaller part of the borders."""
    side = _components(every, 1)[:, 0] > 0
    border = torch.cat([_border(grid) for grid in grids])
    return ~side if side[border].float().mean() > 0.5 else side


def _border(grid: Grid) -> Tensor:
    edge = torch.ones(grid, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    return edge.flatten()


def _spread(values: Float[Tensor, "n channels"]) -> Float[Tensor, "n channels"]:
    """Each channel from 0 to 1 between its 1st and 99th percentile: a few outliers would dull the rest."""
    if len(values) == 0:
        return values
    low, high = (values.quantile(share, dim=0) for share in (0.01, 0.99))
    return ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)


def _coloured(values: NDArray[np.float32]) -> Image.Image:
    from matplotlib import colormaps

    return _picture(colormaps["inferno"](values)[..., :3])


def _picture(colours: NDArray[np.floating]) -> Image.Image:
    return Image.fromarray(np.rint(colours * 255).astype(np.uint8))
