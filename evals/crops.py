"""Randomly cropped training pictures, a function of the position in training."""

import math
import random
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dinov2.data.decode import Unreadable, decode
from dinov2.data.order import Order, derive_seed
from dinov2.data.sources import Source
from dinov2.exits import UserError
from dinov2.features import as_tensor, stacked

SCALE, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
ATTEMPTS = 10  # at a box that fits, and at a picture that can be read
NOTHING = -1  # the label where no picture could be read: an exception would lose its line in a worker


def random_resized_crop(image: Image.Image, size: int, seed: int) -> UInt8[Tensor, "3 size size"]:
    """A box of 8 to 100% of the area, aspect 3/4 to 4/3, resized (bicubic, antialiased); half are flipped."""
    draw = random.Random(seed)
    left, top, width, height = _box(draw, *image.size)
    crop = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
    if draw.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return as_tensor(crop)


def crop_batches(
    source: Source,
    labels: list[int],
    *,
    size: int,
    batch: int,
    seed: int,
    start: int,
    stop: int,
    workers: int,
) -> Iterator[tuple[UInt8[Tensor, "batch 3 size size"], Tensor]]:
    """Crops and labels for the steps from `start` to `stop`, the same for any number of workers.

    A picture that cannot be read is replaced by another.
    """
    loader = DataLoader(
        _Crops(source, labels, size, seed),
        batch_sampler=_Steps(range(start, stop), batch),
        num_workers=workers,
        collate_fn=_together,
        pin_memory=torch.cuda.is_available(),
    )
    for crops, classes in loader:
        if (classes == NOTHING).any():
            raise UserError(f"{ATTEMPTS} pictures of {source.name} one after another cannot be read")
        yield crops, classes


class _Crops(Dataset[Any]):
    """A position in training to a crop and its label."""

    def __init__(self, source: Source, labels: list[int], size: int, seed: int) -> None:
        self.source, self.labels, self.size, self.seed = source, labels, size, seed
        self.order = Order(len(source), seed)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        row = self.order.sample(position)
        for attempt in range(ATTEMPTS):
            try:
                image = decode(self.source.read(row))
            except Unreadable:
                row = self.order.replacement(position, attempt)
                continue
            crop = random_resized_crop(image, self.size, derive_seed("crop", self.seed, position))
            return crop, self.labels[row]
        return torch.zeros(3, self.size, self.size, dtype=torch.uint8), NOTHING


def _together(items: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    return stacked([crop for crop, _ in items]), torch.tensor([label for _, label in items])


class _Steps(Sampler[list[int]]):
    """The positions of each step."""

    def __init__(self, steps: range, batch: int) -> None:
        self.steps, self.batch = steps, batch

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            yield list(range(step * self.batch, (step + 1) * self.batch))


def _box(draw: random.Random, width: int, height: int) -> tuple[int, int, int, int]:
    """left, top, width, height; the largest centred box of an allowed aspect where chance found none."""
    for _ in range(ATTEMPTS):
        area = width * height * draw.uniform(*SCALE)
        aspect = math.exp(draw.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        wide, high = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < high <= height:
            return draw.randint(0, width - wide), draw.randint(0, height - high), wide, high
    wide = min(width, max(1, round(height * ASPECT[1])))
    high = min(height, max(1, round(width / ASPECT[0])))
    return (width - wide) // 2, (height - high) // 2, wide, high
