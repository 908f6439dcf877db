"""Training windows with the truth under them, a function of the position in training."""

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov2.data.order import Order, derive_seed
from dinov2.exits import UserError
from dinov2.features import as_tensor, stacked
from evals.dense_config import DenseConfig
from evals.dense_data import DensePart
from evals.patches import KeptTokens, PatchTokens
from evals.windows import Tiler

GREY = (124, 116, 104)  # about the mean of pictures: what lies outside of a small one
Truth = Callable[[int, tuple[int, int]], NDArray[Any]]  # row and (width, height) to mask or depth


class Batch(NamedTuple):
    """Tokens of some windows, and the truth under them at a window's own size."""

    tokens: Float[Tensor, "batch patches dim"]
    truth: Tensor  # [batch, size, size]


def random_windows(
    tokens: PatchTokens,
    part: DensePart,
    truth: Truth,
    config: DenseConfig,
    *,
    scales: tuple[float, float],
    nothing: float,
    start: int,
) -> Iterator[Batch]:
    """Windows of pictures resized by a random share, half of them flipped, through the backbone.

    The same for any number of workers, and from any step on.

    Args:
        scales: least and most of the resizing, uniform, beside that to the short side of the settings.
        nothing: the truth outside of a picture that is smaller than a window.
    """
    crops = _Crops(part, truth, tokens.tiling, scales, nothing, derive_seed("dense", config.seed))
    positions = range(start * config.batch_size, config.iterations * config.batch_size)
    loader = DataLoader(
        crops,
        sampler=positions,
        batch_size=config.batch_size,
        num_workers=config.workers,
        collate_fn=_together,
    )
    for found in loader:
        if isinstance(found, UserError):
            raise found
        windows, under = found
        yield Batch(tokens(windows), under)


def kept_windows(kept: KeptTokens, truth: Truth, config: DenseConfig, *, start: int) -> Iterator[Batch]:
    """Windows as they are tested, of features that were computed once."""
    seed = derive_seed("dense", config.seed)
    order = Order(len(kept), seed)
    for step in range(start, config.iterations):
        tokens, under = [], []
        for position in range(step * config.batch_size, (step + 1) * config.batch_size):
            row = order.sample(position)
            tiling = kept.tiling(row)
            number = derive_seed("window", seed, position) % len(tiling.corners)
            tokens.append(kept.window(row, number))
            under.append(tiling.cut_truth(truth(row, tiling.picture))[number])
        yield Batch(torch.stack(tokens), torch.stack(under))


class _Crops(Dataset[Any]):
    """A position in training to a window and the truth under it, or to what is wrong with its files."""

    def __init__(
        self,
        part: DensePart,
        truth: Truth,
        tiler: Tiler,
        scales: tuple[float, float],
        nothing: float,
        seed: int,
    ) -> None:
        self.part, self.truth, self.tiler = part, truth, tiler
        self.scales, self.nothing, self.seed = scales, nothing, seed
        self.order = Order(len(part), seed)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor] | UserError:
        row = self.order.sample(position)
        draw = random.Random(derive_seed("window", self.seed, position))
        try:
            image = self.part.image(row)
            truth = self.truth(row, image.size)
        except UserError as error:
            return error
        return self._cropped(image, truth, draw)

    def _cropped(self, image: Image.Image, truth: NDArray[Any], draw: random.Random) -> tuple[Tensor, Tensor]:
        """A square of the resized picture; only that square is ever made."""
        side = self.tiler.window
        ratio = draw.uniform(*self.scales) * self.tiler.short / min(image.size)
        wide, high = (max(1, round(length * ratio)) for length in image.size)
        left, top = draw.randint(0, max(0, wide - side)), draw.randint(0, max(0, high - side))
        inner = min(side, wide), min(side, high)
        box = (left / ratio, top / ratio, (left + inner[0]) / ratio, (top + inner[1]) / ratio)
        box = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))
        window = Image.new("RGB", (side, side), GREY)
        window.paste(image.resize(inner, Image.Resampling.BICUBIC, box=box))
        under = np.full((side, side), self.nothing, dtype=truth.dtype)
        rows, columns = _nearest(box[1], box[3], inner[1]), _nearest(box[0], box[2], inner[0])
        under[: inner[1], : inner[0]] = truth[np.ix_(rows, columns)]
        if draw.random() < 0.5:
            window, under = window.transpose(Image.Transpose.FLIP_LEFT_RIGHT), under[:, ::-1].copy()
        return as_tensor(window), torch.from_numpy(under)


def _nearest(first: float, last: float, count: int) -> NDArray[np.int64]:
    """Pixels of the picture under the middles of `count` equal parts of a stretch."""
    return (first + (np.arange(count) + 0.5) * (last - first) / count).astype(np.int64)


def _together(items: list[Any]) -> Any:
    wrong = next((item for item in items if isinstance(item, UserError)), None)
    if wrong is not None:
        return wrong
    return stacked([window for window, _ in items]), stacked([under for _, under in items])
