"""What turns pictures into vectors: the evaluation transform and a backbone's tokens."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from dinov2.data.arrays import decode_array
from dinov2.exits import UserError
from dinov2.models.backbone import Backbone

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # by name
LONGEST = 8  # times the short side; a longer strip is cut to its middle before it is enlarged
GEM_POWER, GEM_LEAST = 4.0, 1e-6  # of the generalised mean, and what is below counts as it
PART = re.compile(r"cls([1-9]\d*)?|mean|gem")


def gem(patches: Float[Tensor, "n patches dim"]) -> Float[Tensor, "n dim"]:
    return patches.clamp(min=GEM_LEAST).pow(GEM_POWER).mean(1).pow(1 / GEM_POWER)


POOLS: dict[str, Callable[[Tensor], Tensor]] = {"mean": lambda patches: patches.mean(1), "gem": gem}


class Embedder(Protocol):
    """What turns pictures into vectors.

    Attributes:
        dimension: of a vector.
        meta: what the vectors depend on (weights hash, transform, token); vectors of equal meta are alike.
        prepare: a picture to a tensor, in the loader's worker processes, so it has to be picklable.
    """

    @property
    def dimension(self) -> int: ...

    @property
    def meta(self) -> dict[str, Any]: ...

    @property
    def prepare(self) -> Callable[[Image.Image], Tensor]: ...

    def __call__(self, batch: Tensor) -> Float[Tensor, "n dim"]: ...


@dataclass(frozen=True)
class CentreCrop:
    """The published evaluation transform: short side to `resize` (bicubic, antialiased), centre `size`²."""

    size: int = 224
    resize: int = 256

    def __call__(self, image: Image.Image) -> UInt8[Tensor, "3 size size"]:
        return as_tensor(self.picture(image))

    def picture(self, image: Image.Image) -> Image.Image:
        image = _without_ends(image)
        scale = self.resize / min(image.size)
        width, height = (max(self.resize, int(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        return image.crop((left, top, left + self.size, top + self.size))


@dataclass(frozen=True)
class Squeeze:
    """The whole picture as a square, whatever its aspect: what lies at the edge is seen too (SSCD's skew)."""

    size: int = 224

    def __call__(self, image: Image.Image) -> UInt8[Tensor, "3 size size"]:
        return as_tensor(image.resize((self.size, self.size), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class DeepCentreCrop(CentreCrop):
    """The same for pictures of other depths and channels than RGB of 8 bits; gives floats from 0 to 1."""

    channels: int = 1
    value_range: tuple[float, ...] = ()

    def open(self, data: bytes) -> Float[Tensor, "channels height width"]:
        """A file's bytes as what is cropped; raises Unreadable."""
        return torch.from_numpy(decode_array(data, self.channels, self.value_range))

    def __call__(
        self, image: Image.Image | Float[Tensor, "channels height width"]
    ) -> Float[Tensor, "channels size size"]:
        if not isinstance(image, Tensor):
            raise TypeError("pictures with more than 8 bits of RGB are opened by `open`")
        scale = self.resize / min(image.shape[1:])
        sides = [max(self.resize, int(side * scale)) for side in image.shape[1:]]
        large = interpolate(image[None], size=sides, mode="bicubic", antialias=True)[0].clamp_(0, 1)
        top, left = (round((side - self.size) / 2) for side in sides)
        return large[:, top : top + self.size, left : left + self.size].contiguous()


KINDS = {CentreCrop: "centre crop", DeepCentreCrop: "centre crop", Squeeze: "squeeze"}


class BackboneEmbedder:
    """A backbone's tokens as vectors.

    Attributes:
        parts: name and width of what a vector is made of, in order, as in ("cls-2", 384), ("cls-1", 384).
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        size: int = 224,
        resize: int | None = None,
        token: str = "cls",
        squeeze: bool = False,
        normalised: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Args:
        backbone: on `device`, in evaluation mode.
        size: pixels along a side of what it sees.
        resize: pixels of the short side before the centre crop; by default 256 for 224, in proportion.
        token: parts joined by +: "cls"; "cls4", the CLS tokens of the last four blocks; "mean" or "gem" of
            the last block's patch tokens, gem being the generalised mean with power 4 of what is positive,
            as in DINO's copy detection (arXiv 2104.14294, sec. 4.2). All after the final norm.
        squeeze: show whole pictures, squeezed to the square, in place of their centres.
        normalised: give vectors of length 1.
        dtype: float32, or what autocast is to use.

        Raises:
            UserError: the token is unknown, or the size does not suit the backbone.
        """
        resize = round(size * 256 / 224) if resize is None else resize
        if resize < size:
            raise UserError(f"resize={resize} is less than size={size}: the crop would not fit")
        channels, value_range = len(backbone.normalisation[0]), backbone.value_range
        self.prepare = Squeeze(size) if squeeze else CentreCrop(size, resize)
        if channels != 3 or value_range:
            if squeeze:
                raise UserError("pictures of other depths and channels than RGB of 8 bits are not squeezed")
            self.prepare = DeepCentreCrop(size, resize, channels, value_range)
        self.token, self.normalised = token, normalised
        self.device, self.dtype = torch.device(device), dtype
        self._backbone = backbone
        self._weights: str | None = None
        self._last = _blocks_wanted(token, backbone)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in backbone.normalisation)
        self._mean, self._std = mean.to(self.device), std.to(self.device)
        self.parts = self._try(size)
        self.dimension = sum(width for _, width in self.parts)

    @property
    def meta(self) -> dict[str, Any]:
        if self._weights is None:  # hashed once: large backbones take seconds
            self._weights = self._backbone.weights_hash()
        return {
            "weights": self._weights,
            "architecture": self._backbone.architecture(),  # equal weights differ by heads, position, …
            "transform": {"kind": KINDS[type(self.prepare)], **asdict(self.prepare)},
            "input": [list(values) for values in self._backbone.normalisation],
            "token": self.token,
            "parts": [list(part) for part in self.parts],
            "normalised": self.normalised,
            "precision": str(self.dtype).removeprefix("torch."),
        }

    @torch.no_grad()
    def __call__(self, batch: Shaped[Tensor, "n channels size size"]) -> Float[Tensor, "n dim"]:
        vectors = torch.cat([part for _, part in self._tokens(batch)], dim=1)
        return torch.nn.functional.normalize(vectors, dim=1) if self.normalised else vectors

    def _tokens(self, batch: Tensor) -> list[tuple[str, Tensor]]:
        most = 255 if batch.dtype == torch.uint8 else 1
        images = (batch.to(self.device, non_blocking=True).float() / most - self._mean) / self._std
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            patches, cls = self._layers(images)
        found = []
        for name in self.token.split("+"):
            if name in POOLS and not patches.shape[1]:
                raise UserError(f"token={self.token}: this backbone has no patch tokens; take token=cls")
            if name in POOLS:
                found.append((name, POOLS[name](patches.float())))
            else:
                last = int(name.removeprefix("cls") or 1)
                found += [(f"cls-{last - place}", one.float()) for place, one in enumerate(cls[-last:])]
        return found

    def _layers(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Patch tokens of the last block, and the CLS tokens of as many last blocks as are wanted."""
        if self._last == 1:
            features = self._backbone.forward_features(images)
            return features["x_norm_patchtokens"], [features["x_norm_clstoken"]]
        layers = self._backbone.get_intermediate_layers(images, self._last, return_class_token=True)
        return layers[-1][0], [cls for _, cls in layers]

    @torch.no_grad()
    def _try(self, size: int) -> list[tuple[str, int]]:
        """The parts of a vector, from a blank picture: stages of convolutional networks differ in width."""
        patch = self._backbone.patch_size
        try:
            tokens = self._tokens(torch.zeros(1, len(self._mean), size, size, dtype=torch.uint8))
        except (ValueError, AssertionError, RuntimeError) as error:
            if size % patch == 0:
                raise
            raise UserError(f"size={size} does not divide into the backbone's patches of {patch}") from error
        return [(name, part.shape[1]) for name, part in tokens]


def as_tensor(image: Image.Image) -> UInt8[Tensor, "3 height width"]:
    # Transposed by NumPy: torch would start its threads for a picture.
    return torch.from_numpy(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)))


def _without_ends(image: Image.Image) -> Image.Image:
    """A strip of one row of pixels, enlarged whole, would need as many rows as it is long."""
    width, height = image.size
    wide, high = min(width, LONGEST * height), min(height, LONGEST * width)
    left, top = (width - wide) // 2, (height - high) // 2
    return image.crop((left, top, left + wide, top + high)) if (wide, high) != image.size else image


def _blocks_wanted(token: str, backbone: Backbone) -> int:
    """How many of the last blocks these parts need."""
    parts = [PART.fullmatch(name) for name in token.split("+")]
    if not all(parts) or len(set(token.split("+"))) != len(parts):
        raise UserError(f"token={token} is unknown: join cls, cls4, mean or gem by +")
    last = max(int(part[1] or 1) for part in parts if part)
    if last > backbone.n_blocks:
        raise UserError(f"token={token} needs {last} blocks, the backbone has {backbone.n_blocks}")
    return last
