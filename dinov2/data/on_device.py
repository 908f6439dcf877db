"""Colours, blur and solarisation of a batch of crops at once, where the crops are: on a GPU.

The same changes as `dinov2.data.fast` makes one by one, without its roundings. Each crop's are a row of nine
numbers: weights of the pixel, its grey and the mean grey before the hue turns, the turn, the same three after
it, the blur's sigma and whether it is solarised. The rows stay on the CPU, so that nothing here waits for
the device.
"""

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from dinov2.data.augment import SOLARISE_FROM
from dinov2.data.blur import blur
from dinov2.data.fast import GREY, Light

Crops = Float[Tensor, "crops 3 height width"]


def changed(
    crops: UInt8[Tensor, "crops 3 height width"], rows: Float[Tensor, "crops 9"], kernel: int
) -> Crops:
    """The crops with their changes, from 0 to 1, on the device that they are on.

    Args:
        rows: as `dinov2.data.fast.as_row` makes them, on the CPU.
        kernel: of the blur, in pixels.
    """
    x = crops.float() / 255
    x = _lit(x, rows[:, :3])
    if (turned := (rows[:, 3:7] != torch.tensor([0.0, *Light()])).any(dim=1)).any():
        own = _where(turned, x)
        x[own] = _lit(_turned(x[own], _like(x, rows[turned, 3])), rows[turned, 4:7])
    if (blurred := rows[:, 7] > 0).any():
        own = _where(blurred, x)
        x[own] = blur(x[own], rows[blurred, 7].tolist(), kernel)
    if (solarised := rows[:, 8] > 0).any():
        own = _where(solarised, x)
        bright = x[own]
        x[own] = torch.where(bright >= SOLARISE_FROM / 255, 1 - bright, bright)
    return x


def _lit(x: Crops, light: Float[Tensor, "crops 3"]) -> Crops:
    grey = torch.einsum("bchw,c->bhw", x, _like(x, torch.from_numpy(GREY)))[:, None]
    own, other, mean = _like(x, light).T[:, :, None, None, None]
    return (own * x + other * grey + mean * grey.mean(dim=(2, 3), keepdim=True)).clamp_(0, 1)


def _turned(x: Crops, hue: Float[Tensor, " crops"]) -> Crops:
    """The hue moved on by so many turns; value and saturation, as HSV has them, stay."""
    most, least = x.amax(dim=1, keepdim=True), x.amin(dim=1, keepdim=True)
    spread = most - least
    red, green, blue = x.split(1, dim=1)
    safe = spread.clamp(min=1e-8)
    sixths = torch.where(
        most == red,
        (green - blue) / safe,
        torch.where(most == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    where = torch.tensor([5.0, 3.0, 1.0], device=x.device)[:, None, None]
    k = (where + sixths + 6 * hue[:, None, None, None]) % 6
    return most - spread * torch.minimum(k, 4 - k).clamp(0, 1)


def _where(which: Bool[Tensor, " crops"], x: Crops) -> Tensor:
    return which.nonzero().squeeze(1).to(x.device, non_blocking=True)


def _like(x: Crops, numbers: Tensor) -> Tensor:
    return numbers.to(x.device, x.dtype, non_blocking=True)
