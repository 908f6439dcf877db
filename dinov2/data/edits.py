"""Two strongly edited views of a picture, as people edit copies (SSCD, arXiv 2202.10261, sec. 4.2 and 4.4).

After the crops, colours and blur of `dinov2.data.augment`, each view may be mixed with another picture of the
batch, turned, laid into a larger canvas, covered with shapes like emoji, written on, and compressed as JPEG.
The paper's own edits come from AugLy's picture library; ours are drawn, with nothing to download.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from random import Random
from string import ascii_letters, digits
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dinov2.config import listed
from dinov2.data.augment import AugmentConfig, MultiCrop
from dinov2.data.order import derive_seed
from dinov2.data.pixels import Crops, Pixels, as_pixels
from dinov2.exits import UserError

Colour = tuple[int, int, int]
LETTERS = ascii_letters + digits + " .,!?-"


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """Probabilities of the edits of each view, in the order in which they are made, and their strengths."""

    mixup_p: float = 0.05  # of blending another picture of the batch into the second view
    cutmix_p: float = 0.05  # of pasting a rectangle of one into it
    rotate_p: float = 0.1  # half by quarter turns, half by up to 45 degrees
    canvas_p: float = 0.1  # of shrinking the view and laying it onto a larger ground
    shapes_p: float = 0.2  # of one to three shapes like emoji on it
    text_p: float = 0.1  # of a line of text on it
    jpeg_p: float = 0.2  # of compressing it
    jpeg_quality: list[float] = listed(10, 80)  # lowest and highest

    def __post_init__(self) -> None:
        shares = {
            field.name: getattr(self, field.name) for field in fields(self) if field.name.endswith("_p")
        }
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise UserError(f"edits: {name}={share} should lie between 0 and 1")
        if self.mixup_p + self.cutmix_p > 1:
            raise UserError("edits: mixup_p and cutmix_p are more than 1 together")
        if len(self.jpeg_quality) != 2 or not 1 <= self.jpeg_quality[0] <= self.jpeg_quality[1] <= 100:
            raise UserError(f"edits: jpeg_quality={self.jpeg_quality} should be two numbers from 1 to 100")


class EditedViews(MultiCrop):
    """Two edited views of one picture, instead of global and local crops."""

    def __init__(self, config: AugmentConfig, edits: EditConfig) -> None:
        super().__init__(config)
        self.local_kinds = []
        self.edits = edits

    def partner(self, seed: int, position: int, batch: int) -> int | None:
        """The position of the picture that is mixed into the second view of this one, or None.

        It is of the same batch, which is `batch` positions long.
        """
        random = Random(derive_seed("mix", seed, position))
        if batch < 2 or random.random() >= self.edits.mixup_p + self.edits.cutmix_p:
            return None
        first = position - position % batch
        return first + (position - first + 1 + int(random.random() * (batch - 1))) % batch

    def __call__(
        self, picture: Image.Image | Pixels, seed: int, other: Image.Image | Pixels | None = None
    ) -> tuple[Crops, Crops]:
        """Both views, and no local crops. `other` is what is mixed into the second view."""
        views, nothing = super().__call__(picture, seed)
        random = Random(derive_seed("edits", seed))
        if other is not None:
            views[1] = self._mixed(views[1], self._view(other, derive_seed("other", seed)), random)
        for view in views:
            view.copy_(as_pixels(self._edited(Image.fromarray(view.permute(1, 2, 0).numpy()), random)))
        return views, nothing

    def _view(self, picture: Image.Image | Pixels, seed: int) -> Pixels:
        pixels = picture if isinstance(picture, Tensor) else as_pixels(picture)
        return self._crops(pixels, self.global_kinds[1:], self.config.global_size, Random(seed))[0]

    def _mixed(
        self, view: UInt8[Tensor, "3 size size"], other: UInt8[Tensor, "3 size size"], random: Random
    ) -> UInt8[Tensor, "3 size size"]:
        """The other makes up 30 to 70% of the picture, by brightness (mixup) or by area (cutmix)."""
        blended = random.random() * (self.edits.mixup_p + self.edits.cutmix_p) < self.edits.mixup_p
        share = 0.3 + 0.4 * random.random()
        if blended:
            return torch.lerp(view.float(), other.float(), share).round_().to(torch.uint8)
        size = view.shape[1]
        height = round(size * (share + (1 - share) * random.random()))  # from share, at full width, to 1
        width = min(size, round(share * size * size / height))
        top, left = int(random.random() * (size - height + 1)), int(random.random() * (size - width + 1))
        mixed = view.clone()
        mixed[:, top : top + height, left : left + width] = other[:, top : top + height, left : left + width]
        return mixed

    def _edited(self, image: Image.Image, random: Random) -> Image.Image:
        for name, edit in EDITS.items():
            if random.random() < getattr(self.edits, name):
                image = edit(image, random)
        if random.random() < self.edits.jpeg_p:
            low, high = self.edits.jpeg_quality
            image = compressed(image, round(low + (high - low) * random.random()))
        return image


def turned(image: Image.Image, random: Random) -> Image.Image:
    if random.random() < 0.5:
        quarters = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
        return image.transpose(_choice(quarters, random))
    angle = 90 * random.random() - 45
    return image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=_colour(random))


def on_canvas(image: Image.Image, random: Random) -> Image.Image:
    """40 to 90% of the side, on one colour or on a gradient of two."""
    size = image.size[0]
    side = max(1, round(size * (0.4 + 0.5 * random.random())))
    page = Image.new("RGB", image.size, _colour(random))
    if random.random() < 0.5:
        ramp = Image.linear_gradient("L").resize(image.size)
        page.paste(Image.new("RGB", image.size, _colour(random)), mask=ramp)
    place = int(random.random() * (size - side + 1)), int(random.random() * (size - side + 1))
    page.paste(image.resize((side, side), Image.Resampling.BILINEAR), place)
    return page


def with_shapes(image: Image.Image, random: Random) -> Image.Image:
    """One to three faces, stars and polygons of 15 to 45% of the side, partly see-through."""
    size = image.size[0]
    for _ in range(1 + int(3 * random.random())):
        side = max(4, round(size * (0.15 + 0.3 * random.random())))
        left, top = (int(random.random() * (size - side // 2)) for _ in range(2))
        layer = Image.new("L", image.size, 0)
        opaque = 150 + int(106 * random.random())
        colour = _colour(random)
        draw, ink = ImageDraw.Draw(layer), ImageDraw.Draw(image)
        if random.random() < 0.5:
            draw.ellipse((left, top, left + side, top + side), fill=opaque)
        else:
            draw.polygon(_star(left, top, side, random), fill=opaque)
        image.paste(Image.new("RGB", image.size, colour), mask=layer)
        if random.random() < 0.5:
            _face(ink, left, top, side)
    return image


def with_text(image: Image.Image, random: Random) -> Image.Image:
    size = image.size[0]
    words = "".join(_choice(LETTERS, random) for _ in range(3 + int(15 * random.random())))
    height = max(6, round(size * (0.08 + 0.17 * random.random())))
    place = size * (0.6 * random.random() - 0.1), size * 0.9 * random.random()
    ImageDraw.Draw(image).text(place, words, fill=_colour(random), font=_font(height))
    return image


def compressed(image: Image.Image, quality: int) -> Image.Image:
    """As JPEG of this quality, and back."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


EDITS: dict[str, Callable[[Image.Image, Random], Image.Image]] = {
    "rotate_p": turned,
    "canvas_p": on_canvas,
    "shapes_p": with_shapes,
    "text_p": with_text,
}


def _choice(options: Sequence[Any], random: Random) -> Any:
    """As `Random.choice`, which draws otherwise in every Python."""
    return options[int(random.random() * len(options))]


def _colour(random: Random) -> Colour:
    return int(256 * random.random()), int(256 * random.random()), int(256 * random.random())


def _star(left: int, top: int, side: int, random: Random) -> list[tuple[float, float]]:
    corners, waist, turn = 3 + int(5 * random.random()), 0.35 + 0.65 * random.random(), random.random()
    angles = np.pi * (np.arange(2 * corners) / corners + turn)
    reach = side / 2 * np.where(np.arange(2 * corners) % 2, waist, 1.0)
    centre = left + side / 2, top + side / 2
    return [
        (centre[0] + r * math.cos(a), centre[1] + r * math.sin(a)) for r, a in zip(reach, angles, strict=True)
    ]


def _face(ink: ImageDraw.ImageDraw, left: int, top: int, side: int) -> None:
    for across in (0.3, 0.6):
        ink.ellipse(
            (left + across * side, top + 0.3 * side, left + (across + 0.1) * side, top + 0.42 * side),
            fill=(0, 0, 0),
        )
    mouth = (left + 0.25 * side, top + 0.35 * side, left + 0.75 * side, top + 0.8 * side)
    ink.arc(mouth, 20, 160, fill=(0, 0, 0), width=max(1, side // 16))


@lru_cache(maxsize=64)
def _font(height: int) -> Any:
    return ImageFont.load_default(height)
