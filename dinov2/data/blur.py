"""Gaussian blur of crops, each with a sigma of its own.

Both ways are weighted sums of shifted tensors, along rows and then along columns: several times faster than a
convolution for these sizes, and the same bits for any number of threads and crops.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from dinov2.data.pixels import Pixels

Floats = Float[Tensor, "crops channels height width"]

LEAST = 1e-5  # of the sum of weights: what is further out changes no pixel by a hundredth of a level


def blur_one(crop: Pixels, sigma: float, kernel: int) -> Pixels:
    """Gaussian blur of a crop on the CPU; equals torchvision's within one level.

    The crop is laid out as one row with its margins, so that a shift along either axis is an offset.
    """
    weights = _half(sigma, kernel)
    _, height, width = crop.shape
    reach = len(weights) - 1
    padded = _mirrored(crop.numpy(), reach)
    row = _slide(_slide(padded.ravel(), weights, 1), weights, width + 2 * reach)
    whole = np.empty(padded.size, np.float32)  # the last rows and columns are left as they come: margins
    whole[: row.size] = row
    blurred = whole.reshape(padded.shape)[:, :height, :width]
    if crop.dtype == torch.uint8:
        return torch.from_numpy((blurred + np.float32(0.5)).astype(np.uint8))
    return torch.from_numpy(blurred.clip(0, 1))


def _half(sigma: float, kernel: int) -> list[np.float32]:
    """Weights of the middle and of its neighbours on one side, as far as they matter."""
    weights = np.exp(-((np.arange(kernel // 2 + 1) / sigma) ** 2) / 2)
    weights /= 2 * weights.sum() - weights[0]
    return [np.float32(weight) for weight in weights if weight >= LEAST]


def _mirrored(crop: np.ndarray, reach: int) -> Float[np.ndarray, "channels height+2*reach width+2*reach"]:
    """With margins that mirror it about its outermost pixels; numpy's own way takes three times as long."""
    channels, height, width = crop.shape
    padded = np.empty((channels, height + 2 * reach, width + 2 * reach), np.float32)
    inner = padded[:, reach : reach + height]
    inner[:, :, reach : reach + width] = crop
    for step in range(1, reach + 1):
        inner[:, :, reach - step] = inner[:, :, reach + step]
        inner[:, :, reach + width - 1 + step] = inner[:, :, reach + width - 1 - step]
    for step in range(1, reach + 1):
        padded[:, reach - step] = padded[:, reach + step]
        padded[:, reach + height - 1 + step] = padded[:, reach + height - 1 - step]
    return padded


def _slide(row: np.ndarray, weights: list[np.float32], stride: int) -> np.ndarray:
    """Weighted sums of what lies `stride` apart; the first is about number reach * stride."""
    reach = len(weights) - 1
    length = row.size - 2 * reach * stride
    total = row[reach * stride :][:length] * weights[0]
    pair = np.empty_like(total)
    for step, weight in enumerate(weights[1:], 1):
        np.add(row[(reach - step) * stride :][:length], row[(reach + step) * stride :][:length], out=pair)
        pair *= weight
        total += pair
    return total


def blur(crops: Floats, sigmas: Sequence[float], kernel: int) -> Floats:
    """Gaussian blur of all crops at once, on any device."""
    reach = kernel // 2
    distances = torch.arange(-reach, reach + 1) / torch.tensor(sigmas)[:, None]  # on the CPU on every device
    weights = torch.exp(-(distances**2) / 2)
    weights = (weights / weights.sum(dim=1, keepdim=True))[:, :, None, None, None].to(crops.device)
    padded = pad(crops, (reach, reach, reach, reach), mode="reflect")
    return _slide_all(_slide_all(padded, weights, dim=2), weights, dim=3).clamp_(0, 1)


def _slide_all(padded: Floats, weights: Float[Tensor, "crops kernel 1 1 1"], dim: int) -> Floats:
    """Weighted sums of neighbours along one dimension, which becomes shorter by kernel - 1."""
    length = padded.shape[dim] - weights.shape[1] + 1
    total = padded.narrow(dim, 0, length) * weights[:, 0]
    for offset in range(1, weights.shape[1]):
        total.addcmul_(padded.narrow(dim, offset, length), weights[:, offset])
    return total
