"""Multi-crop augmentation of pictures (DINO sec. 3.1 and appendix; BYOL appendix B; DINOv2 appendix B).

RGB pictures of 8 bits are uint8 in and out. Pictures of other depths and channels are floats from 0 to 1 (see
`dinov2.data.arrays`): crops, flips, brightness, contrast, blur and solarisation apply to any number of
channels, saturation, hue and grey to three.

What is done to each crop is drawn first, from a generator of the sample's own, and then carried out: the
global random state is neither used nor changed. Resizing is torchvision's of uint8 tensors; colours and blur
are `dinov2.data.colours` and `dinov2.data.blur`, which round as Pillow's do. But for roundings of resizing,
hue and blur, pixels equal those of torchvision's transforms on Pillow pictures, in a third of the time.
`dinov2.data.fast` carries out the same plans faster still and rounds less often.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from dinov2.config import listed, one_of
from dinov2.data.arrays import decode_array
from dinov2.data.blur import blur_one
from dinov2.data.colours import recoloured
from dinov2.data.order import derive_seed
from dinov2.data.pixels import Crops, Pixels, as_pixels, read_pixels
from dinov2.exits import UserError

# Probabilities of blurring global crop 1, global crop 2 and a local crop. The published code inverts the
# probability that its settings name, and the published weights were trained that way. In SimCLR it
# is the same for all.
BLUR = {"as_intended": (1.0, 0.1, 0.5), "as_released": (0.0, 0.9, 0.5), "simclr": (0.5, 0.5, 0.5)}
MODES = ("exact", "fast")
SOLARISE_FROM = 128
ASPECT = (3 / 4, 4 / 3)  # width / height of a crop's box

ATTEMPTS = 10  # boxes that do not fit into the picture before the middle of it is taken


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Two global crops and some local ones of every picture, and what is done to them."""

    global_size: int = 224  # pixels, a multiple of the patch size
    global_scale: list[float] = listed(0.32, 1.0)  # of the picture's area
    gram_size: int = 0  # of the global crops once more, colours as they are, for losses.gram; 0: none
    mixed: list[list[int]] = listed()  # [global, local, gram] sizes of which each step draws one instead
    local_size: int = 96  # 98 for patches of 14
    local_scale: list[float] = listed(0.05, 0.32)
    local_crops: int = 8
    flip_p: float = 0.5
    jitter: list[float] = listed(0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.8
    grey_p: float = 0.2
    blur: str = "as_intended"  # or as_released, simclr
    blur_kernel: int = 9  # pixels, odd
    blur_sigma: list[float] = listed(0.1, 2.0)
    solarise_p: float = 0.2  # of the second global crop
    mean: list[float] = listed(0.485, 0.456, 0.406)  # of the pixels in [0, 1]; one for each channel
    std: list[float] = listed(0.229, 0.224, 0.225)
    value_range: list[float] = listed()  # values that become 0 and 1, as 0 and 65535; empty: RGB of 8 bits
    mode: str = "exact"  # exact: as torchvision on Pillow; fast: as good, other numbers (wants extra fast)
    scaled_decode: bool = True  # read a large JPEG at 1/2, 1/4 or 1/8 where no crop is enlarged by that

    def __post_init__(self) -> None:
        one_of(self.blur, BLUR, "blur")
        one_of(self.mode, MODES, "mode")
        if any(len(sizes) != 3 or min(sizes[:2]) < 1 or sizes[2] < 0 for sizes in self.mixed):
            raise UserError(f"mixed={self.mixed} should list [global, local, gram] sizes; gram 0 for none")
        for key in ("flip_p", "jitter_p", "grey_p", "solarise_p"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"{key}={getattr(self, key)} should lie between 0 and 1")
        for key, limit in (("global_scale", 1.0), ("local_scale", 1.0), ("blur_sigma", math.inf)):
            given = getattr(self, key)
            if len(given) != 2 or not 0 < given[0] <= given[1] <= limit:
                raise UserError(f"{key}={given} should be two numbers, 0 < low <= high <= {limit}")
        if len(self.jitter) != 4 or min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise UserError(f"jitter={self.jitter} should be four numbers from 0 on, the last at most 0.5")
        if self.blur_kernel % 2 == 0 or not 0 < self.blur_kernel < 2 * min(self.global_size, self.local_size):
            raise UserError(f"blur_kernel={self.blur_kernel} should be odd and less than twice the crop size")
        if self.local_crops < 0 or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise UserError("local_crops should be 0 or more, mean and std of equal length, std above 0")
        if self.value_range and not (
            len(self.value_range) == 2 and self.value_range[0] < self.value_range[1]
        ):
            raise UserError(f"value_range={self.value_range} should be two numbers, the lower first")

    @property
    def deep(self) -> bool:
        """Whether pictures are read with all their bits, as floats, and not as RGB of 8 bits."""
        return len(self.mean) != 3 or bool(self.value_range)


class CropKind(NamedTuple):
    """What distinguishes the first global crop, the second, and the local ones."""

    size: int
    scale: Sequence[float]
    blur_p: float
    solarise_p: float


class CropPlan(NamedTuple):
    """All that was drawn for one crop, in the order in which it is carried out."""

    box: tuple[int, int, int, int]  # top, left, height, width
    flip: bool
    colours: list[tuple[int, float]]  # index into COLOURS and amount
    grey: bool
    sigma: float | None
    solarise: bool


class MultiCrop:
    """The augmentation of one picture: `global, local = crop(image, seed)`. Same seed, same bytes."""

    def __init__(self, config: AugmentConfig) -> None:
        first, second, local = BLUR[config.blur]
        self.config = config
        self.global_kinds = [
            CropKind(config.global_size, config.global_scale, first, 0.0),
            CropKind(config.global_size, config.global_scale, second, config.solarise_p),
        ]
        self.local_kinds = [CropKind(config.local_size, config.local_scale, local, 0.0)] * config.local_crops

    def at(self, seed: int, step: int) -> "MultiCrop":
        """The augmentation of a step: of one of the mixed sizes, the same on all ranks (DINOv3 sec. 5.1)."""
        if not self.config.mixed:
            return self
        sizes = self.config.mixed[derive_seed("size", seed, step) % len(self.config.mixed)]
        names = ("global_size", "local_size", "gram_size")
        return MultiCrop(replace(self.config, mixed=[], **dict(zip(names, sizes, strict=True))))

    @property
    def short_side(self) -> int | None:
        """Pixels that a picture's short side may be reduced to without any crop being enlarged for it."""
        if not self.config.scaled_decode:
            return None
        sizes = [(kind.size, kind.scale[0]) for kind in self.global_kinds + self.local_kinds]
        sizes.append((self.config.gram_size, self.config.global_scale[0]))
        return math.ceil(max(size / math.sqrt(scale * ASPECT[0]) for size, scale in sizes))

    def open(self, data: bytes) -> Pixels:
        """A file's bytes as a picture to crop from: RGB of 8 bits, or floats where `AugmentConfig.deep`.

        Raises:
            Unreadable: it is no picture, or one of another number of channels.
        """
        if self.config.deep:
            return torch.from_numpy(decode_array(data, len(self.config.mean), self.config.value_range))
        return read_pixels(data, self.short_side)

    def partner(self, seed: int, position: int, batch: int) -> int | None:
        """The position of a picture that is mixed into the one at this position: none here."""
        return None

    def changes(self, picture: Image.Image | Pixels, seed: int) -> Float[Tensor, "crops 9"] | None:
        """What a call with this seed leaves to the device, global crops first: nothing here."""
        return None

    def __call__(
        self, picture: Image.Image | Pixels, seed: int, other: Image.Image | Pixels | None = None
    ) -> tuple[Crops, Crops]:
        """The global and the local crops; runs in the calling thread and leaves the random state alone."""
        random = Random(seed)
        pixels = picture if isinstance(picture, Tensor) else as_pixels(picture)
        return (
            self._crops(pixels, self.global_kinds, self.config.global_size, random),
            self._crops(pixels, self.local_kinds, self.config.local_size, random),
        )

    def undistorted(self, picture: Image.Image | Pixels, seed: int) -> Crops:
        """The global crops that a call with this seed gives, of `gram_size`, without changes of colour."""
        random, size = Random(seed), self.config.gram_size
        pixels = picture if isinstance(picture, Tensor) else as_pixels(picture)
        _, height, width = pixels.shape
        plans = [draw_plan(self.config, kind, height, width, random) for kind in self.global_kinds]
        return torch.stack([cut(pixels, plan._replace(colours=[], grey=False), size) for plan in plans])

    def _crops(
        self,
        pixels: Pixels,
        kinds: Sequence[CropKind],
        size: int,
        random: Random,
    ) -> Crops:
        _, height, width = pixels.shape
        plans = [draw_plan(self.config, kind, height, width, random) for kind in kinds]
        crops = torch.empty(len(kinds), len(pixels), size, size, dtype=pixels.dtype)
        for crop, plan in zip(crops, plans, strict=True):
            own = cut(pixels, plan, size)
            if plan.sigma is not None:
                own = blur_one(own, plan.sigma, self.config.blur_kernel)
            crop.copy_(solarised(own) if plan.solarise else own)
        return crops


def draw_plan(config: AugmentConfig, kind: CropKind, height: int, width: int, random: Random) -> CropPlan:
    """What will be done to one crop of a picture of height x width pixels.

    Uses nothing of `random` but `.random()`, the one method that is the same in every Python.
    """
    box = _draw_box(kind.scale, height, width, random)
    flip = random.random() < config.flip_p
    colours = _draw_colours(config.jitter, random) if random.random() < config.jitter_p else []
    grey = random.random() < config.grey_p
    sigma = _between(config.blur_sigma, random) if random.random() < kind.blur_p else None
    return CropPlan(box, flip, colours, grey, sigma, random.random() < kind.solarise_p)


def _between(ends: Sequence[float], random: Random) -> float:
    return ends[0] + (ends[1] - ends[0]) * random.random()


def _draw_box(scale: Sequence[float], height: int, width: int, random: Random) -> tuple[int, int, int, int]:
    """A random resized crop: area uniform in `scale`, aspect uniform in the logarithm between 3/4 and 4/3."""
    aspects = math.log(ASPECT[0]), math.log(ASPECT[1])
    for _ in range(ATTEMPTS):
        area = height * width * _between(scale, random)
        aspect = math.exp(_between(aspects, random))
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < across <= width and 0 < down <= height:
            top = int(random.random() * (height - down + 1))
            return top, int(random.random() * (width - across + 1)), down, across
    across = min(width, max(1, round(height * ASPECT[1])))  # a long, narrow picture: the middle of it
    down = min(height, max(1, round(width / ASPECT[0])))
    return (height - down) // 2, (width - across) // 2, down, across


def _draw_colours(jitter: Sequence[float], random: Random) -> list[tuple[int, float]]:
    """Amounts of the four colour changes, in random order; those that change nothing are left out."""
    light = [_between((max(0.0, 1 - most), 1 + most), random) for most in jitter[:3]]
    amounts = [*light, _between((-jitter[3], jitter[3]), random)]
    order = sorted(range(4), key=lambda _: random.random())
    return [(index, amounts[index]) for index in order if jitter[index] > 0]


def resized(pixels: Pixels, box: tuple[int, int, int, int], size: int) -> Pixels:
    """Cuts and resizes (bicubic, antialiased) one crop; channels are last in memory."""
    top, left, height, width = box
    part = pixels[None, :, top : top + height, left : left + width]
    part = part.contiguous(memory_format=torch.channels_last)  # the faster way through the resize
    # what torchvision's resize calls, without what it does around it: half of the time of a small crop
    return interpolate(part, size=(size, size), mode="bicubic", antialias=True)[0]


def cut(pixels: Pixels, plan: CropPlan, size: int) -> Pixels:
    """Cuts, resizes, flips and colours one crop."""
    crop = resized(pixels, plan.box, size)
    if crop.dtype != torch.uint8:
        crop = crop.flip(-1) if plan.flip else crop
        return _coloured(crop.clamp_(0, 1), plan)  # bicubic weights can be negative
    array = crop.numpy()
    planes = np.ascontiguousarray(array[..., ::-1] if plan.flip else array)
    if plan.colours or plan.grey:
        planes = recoloured(planes, plan.colours, plan.grey)
    return torch.from_numpy(planes)


def solarised(crop: Pixels) -> Pixels:
    """As torchvision's `solarize`, which takes forty times as long with uint8."""
    if crop.dtype != torch.uint8:
        return _torchvision().solarize(crop, SOLARISE_FROM / 255)
    return torch.minimum(crop, 255 - crop)  # from SOLARISE_FROM on, and only there, 255 - x is the lesser


@cache
def _torchvision() -> Any:
    """Its functions. Only floats need them; importing it takes a sixth of the time to the first step."""
    import dinov2.vision_ops  # noqa: F401  # for what its import does: torchvision can be imported

    from torchvision.transforms.v2 import functional

    return functional


def _coloured(
    crop: Float[Tensor, "channels height width"], plan: CropPlan
) -> Float[Tensor, "channels height width"]:
    """The same changes on floats; of other than three channels only those of light."""
    if not (plan.colours or plan.grey):
        return crop
    F = _torchvision()
    for index, amount in plan.colours:
        if index == 0:
            crop = (crop * amount).clamp_(0, 1)
        elif index == 1:
            grey = F.rgb_to_grayscale(crop) if len(crop) == 3 else crop
            crop = (grey.mean() + (crop - grey.mean()) * amount).clamp_(0, 1)
        elif len(crop) == 3:
            crop = (F.adjust_saturation, F.adjust_hue)[index - 2](crop, amount)
    return F.rgb_to_grayscale(crop, num_output_channels=3) if plan.grey and len(crop) == 3 else crop


def normalise(
    crops: Crops,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "crops channels height width"]:
    """(crops / 255 - mean) / std on the crops' device, computed in float32 and returned as `dtype`.

    Floats lie between 0 and 1 already.
    """
    middle = torch.tensor(mean, device=crops.device)[:, None, None]
    spread = torch.tensor(std, device=crops.device)[:, None, None]
    most = 255 if crops.dtype == torch.uint8 else 1
    return crops.to(torch.float32, copy=True).mul_(1 / (most * spread)).sub_(middle / spread).to(dtype)
