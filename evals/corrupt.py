"""The fifteen corruptions of ImageNet-C (arXiv 1903.12261, sec. 3, app. B), written from their descriptions.

The paper says what each kind is and gives no numbers. The strengths here are ours, in five steps from slight
to severe. Frost is grown from noise, for the paper's is a photograph. So figures compare backbones that
were measured here, and differ somewhat from those on the published files.

What is drawn depends on the seed, the kind and the picture's own pixels, and not on the strength, so that a
stronger corruption is the same one, more of it. Lengths are those of 224 pixels and grow with the picture.
"""

import io
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image

from dinov2.data.order import derive_seed

SIDE = 224  # pixels that lengths are given for
Pixels = Float[NDArray, "height width 3"]  # from 0 to 1
Field = Float[NDArray, "height width"]


def corrupt(
    picture: UInt8[NDArray, "height width 3"], kind: str, strength: int, seed: int = 0
) -> UInt8[NDArray, "height width 3"]:
    """The picture, corrupted: `kind` is a key of KINDS, `strength` from 1 to 5."""
    function, settings = KINDS[kind]
    of_picture = int.from_bytes(blake2b(picture.tobytes(), digest_size=8).digest())
    draw = np.random.default_rng([derive_seed("corruption", seed, kind), of_picture])
    pixels = function(picture.astype(np.float64) / 255, settings[strength - 1], draw)
    return np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)


def gaussian_noise(pixels: Pixels, deviation: float, draw: np.random.Generator) -> Pixels:
    """Of little light."""
    return pixels + draw.normal(size=pixels.shape) * deviation


def shot_noise(pixels: Pixels, photons: float, draw: np.random.Generator) -> Pixels:
    """So many photons at white, each by chance (Poisson)."""
    return draw.poisson(pixels * photons) / photons


def impulse_noise(pixels: Pixels, share: float, draw: np.random.Generator) -> Pixels:
    """This share of the values is 0 or 1, each channel by itself: bit errors, salt and pepper in colour."""
    chance = draw.random(pixels.shape)
    return np.where(chance < share / 2, 0.0, np.where(chance > 1 - share / 2, 1.0, pixels))


def defocus_blur(pixels: Pixels, radius: float, draw: np.random.Generator) -> Pixels:
    """Every point becomes a disc."""
    radius = radius * _scale(pixels)
    return _convolved(pixels, np.clip(radius + 0.5 - _distances(radius), 0, 1))


def glass_blur(pixels: Pixels, settings: tuple[float, float], draw: np.random.Generator) -> Pixels:
    """Frosted glass: each pixel shows another nearby, between two soft blurs.

    Settings: the standard deviations of blur and of displacement.
    """
    blurred, moved = (length * _scale(pixels) for length in settings)
    height, width = pixels.shape[:2]
    y, x = np.indices((height, width)) + np.rint(draw.normal(size=(2, height, width)) * moved).astype(int)
    soft = _softened(pixels, blurred)
    return _softened(soft[y.clip(0, height - 1), x.clip(0, width - 1)], blurred)


def motion_blur(pixels: Pixels, length: float, draw: np.random.Generator) -> Pixels:
    """Every point becomes a streak that fades, in one direction for the whole picture."""
    return _convolved(pixels, _streak(length * _scale(pixels), draw.uniform(-np.pi / 4, np.pi / 4)))


def zoom_blur(pixels: Pixels, most: float, draw: np.random.Generator) -> Pixels:
    """The mean of the picture enlarged about its middle, by 1 up to `most`, a hundredth more each time."""
    factors = np.arange(1, most + 1e-6, 0.01)
    return np.mean([_enlarged(pixels, factor) for factor in factors], axis=0)


def snow(pixels: Pixels, settings: tuple[float, float, float], draw: np.random.Generator) -> Pixels:
    """Falling flakes, near and far, over a picture that is paler: share covered, length of fall, paleness."""
    share, length, paleness = settings
    angle = np.pi / 2 + draw.uniform(-np.pi / 5, np.pi / 5)
    flakes = np.zeros(pixels.shape[:2])
    for size in (1.0, 2.5):
        field = _softened(draw.normal(size=flakes.shape), size * _scale(pixels))
        fallen = np.clip((field - np.quantile(field, 1 - share)) / max(field.std() / 2, 1e-9), 0, 1)
        streaks = _convolved(fallen[..., None], _streak(length * size / 2 * _scale(pixels), angle))[..., 0]
        flakes = 1 - (1 - flakes) * (1 - np.clip(1.6 * streaks, 0, 1))
    grey = pixels.mean(axis=2, keepdims=True)
    pale = pixels + paleness * (np.clip(0.4 + 0.8 * grey, 0, 1) - pixels)
    return pale + (1 - pale) * flakes[..., None]


def frost(pixels: Pixels, settings: tuple[float, float], draw: np.random.Generator) -> Pixels:
    """Ice crystals on a window: needles along the borders of random cells, and rime between them.

    Settings: how far they cover the picture, how far they hide what is behind.
    """
    from scipy.spatial import KDTree

    cover, hiding = settings
    height, width = pixels.shape[:2]
    bent = np.moveaxis(np.indices((height, width)), 0, -1) / min(height, width)
    bent = bent + 0.06 * np.stack([_plasma((height, width), draw, 0.6) - 0.5 for _ in range(2)], axis=-1)
    edges = np.zeros((height, width))
    for cells, weight in ((25, 1.0), (120, 0.7), (500, 0.5)):
        seeds = draw.random((cells, 2)) * [height, width] / min(height, width)
        near = np.asarray(KDTree(seeds).query(bent, k=2)[0])
        edges += weight * np.exp(-(near[..., 1] - near[..., 0]) * cells**0.5 * 6)
    rime = _plasma((height, width), draw, 0.55)
    ice = np.clip(0.5 * edges + rime - (1 - cover), 0, 1)[..., None]
    colour = np.array([0.82, 0.9, 1.0]) * (0.6 + 0.4 * np.clip(edges, 0, 1))[..., None]
    return pixels + hiding * ice * (colour - pixels)


def fog(pixels: Pixels, settings: tuple[float, float], draw: np.random.Generator) -> Pixels:
    """Thickness by the diamond-square algorithm; light is lost by exp(-thickness), and fog's white added.

    Settings: mean thickness, and by how much finer structure is fainter.
    """
    density, smoothness = settings
    passed = np.exp(-2 * density * _plasma(pixels.shape[:2], draw, smoothness))[..., None]
    return pixels * passed + 0.95 * (1 - passed)


def brightness(pixels: Pixels, more: float, draw: np.random.Generator) -> Pixels:
    """A higher value at the same hue and saturation (HSV)."""
    value = pixels.max(axis=2, keepdims=True)
    brighter = np.clip(value + more, 0, 1)
    return np.where(value > 0, pixels * brighter / np.maximum(value, 1e-9), brighter)


def contrast(pixels: Pixels, kept: float, draw: np.random.Generator) -> Pixels:
    """Differences from the mean colour shrink to this share."""
    mean = pixels.mean(axis=(0, 1))
    return mean + kept * (pixels - mean)


def elastic_transform(pixels: Pixels, settings: tuple[float, float], draw: np.random.Generator) -> Pixels:
    """Places move by smooth random fields: by so many pixels (standard deviation), alike over so many."""
    from scipy.ndimage import map_coordinates

    amount, smoothness = (length * _scale(pixels) for length in settings)
    shape = pixels.shape[:2]
    fields = [_softened(draw.normal(size=shape), smoothness) for _ in range(2)]
    moved = [
        where + amount * field / max(field.std(), 1e-9)
        for where, field in zip(np.indices(shape), fields, strict=True)
    ]
    channels = [map_coordinates(pixels[..., c], moved, order=1, mode="reflect") for c in range(3)]
    return np.stack(channels, axis=-1)


def pixelate(pixels: Pixels, kept: float, draw: np.random.Generator) -> Pixels:
    """Reduced to this share of its sides by averages, and enlarged by copying pixels."""
    image = _as_image(pixels)
    small = image.resize([max(1, round(side * kept)) for side in image.size], Image.Resampling.BOX)
    return np.asarray(small.resize(image.size, Image.Resampling.NEAREST)) / 255.0


def jpeg_compression(pixels: Pixels, quality: int, draw: np.random.Generator) -> Pixels:
    """Through a JPEG of this quality."""
    file = io.BytesIO()
    _as_image(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB")) / 255.0


KINDS: dict[str, tuple[Callable[[Pixels, Any, np.random.Generator], Pixels], tuple[Any, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": (impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": (defocus_blur, (2.5, 3.5, 5, 7, 9)),
    "glass_blur": (glass_blur, ((0.5, 0.8), (0.6, 1.2), (0.7, 1.8), (0.8, 2.6), (0.9, 3.6))),
    "motion_blur": (motion_blur, (6, 10, 15, 21, 28)),
    "zoom_blur": (zoom_blur, (1.11, 1.16, 1.21, 1.26, 1.32)),
    "snow": (snow, ((0.02, 5, 0.2), (0.04, 7, 0.3), (0.07, 9, 0.35), (0.1, 10, 0.4), (0.14, 12, 0.5))),
    "frost": (frost, ((0.35, 0.7), (0.5, 0.8), (0.6, 0.85), (0.7, 0.9), (0.8, 0.95))),
    "fog": (fog, ((0.25, 0.5), (0.45, 0.5), (0.7, 0.55), (1.0, 0.55), (1.4, 0.6))),
    "brightness": (brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": (elastic_transform, ((2, 12), (2.75, 10), (3.5, 8), (4.25, 7.5), (5.5, 7))),
    "pixelate": (pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": (jpeg_compression, (25, 18, 15, 10, 7)),
}


def _scale(pixels: NDArray) -> float:
    return min(pixels.shape[:2]) / SIDE


def _as_image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(np.rint(pixels * 255).astype(np.uint8))


def _softened(values: NDArray, deviation: float) -> NDArray:
    """Gaussian blur of height and width."""
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(values, (deviation, deviation, *[0] * (values.ndim - 2)), mode="reflect")


def _convolved(pixels: Float[NDArray, "height width c"], kernel: Field) -> Float[NDArray, "height width c"]:
    """With a kernel of odd sides, made to sum to 1; the picture is mirrored at its borders."""
    from scipy.signal import fftconvolve

    reach = [side // 2 for side in kernel.shape]
    padded = np.pad(pixels, [(one, one) for one in reach] + [(0, 0)], mode="symmetric")
    return fftconvolve(padded, (kernel / kernel.sum())[..., None], mode="valid", axes=(0, 1))


def _distances(radius: float) -> Field:
    """From the middle of a kernel that holds this radius."""
    reach = int(np.ceil(radius))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return np.hypot(y, x)


def _streak(length: float, angle: float) -> Field:
    """A kernel: a line from its middle that fades over `length`, one pixel wide."""
    reach = max(1, int(np.ceil(length)))
    along = np.arange(0, length + 0.5, 0.25)
    weight = np.exp(-0.5 * (along / max(length / 2, 0.5)) ** 2)
    kernel = np.zeros((2 * reach + 3, 2 * reach + 3))
    y, x = (reach + 1 + along * turn for turn in (np.sin(angle), np.cos(angle)))
    for down in (0, 1):  # each point is shared by the four pixels about it
        for right in (0, 1):
            row, column = np.floor(y).astype(int) + down, np.floor(x).astype(int) + right
            share = (1 - abs(y - row)) * (1 - abs(x - column))
            np.add.at(kernel, (row, column), weight * share)
    return kernel


def _enlarged(pixels: Pixels, factor: float) -> Pixels:
    """The middle of the picture at its full size."""
    height, width = pixels.shape[:2]
    box = [side / 2 * (1 + sign / factor) for sign in (-1, 1) for side in (width, height)]
    channels = [
        Image.fromarray(pixels[..., c].astype(np.float32)).resize(
            (width, height), Image.Resampling.BILINEAR, box=(box[0], box[1], box[2], box[3])
        )
        for c in range(3)
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1)


def _plasma(shape: tuple[int, ...], draw: np.random.Generator, fainter: float) -> Field:
    """A random surface from 0 to 1 by the diamond-square algorithm (Fournier et al. 1982) on a torus.

    Args:
        fainter: the amplitude of each finer level over that of the coarser one.
    """
    side = 1 << max(1, int(np.ceil(np.log2(max(shape)))))
    field, amplitude, step = np.zeros((side, side)), 1.0, side
    while step > 1:
        half = step // 2
        corners = field[::step, ::step]
        count = len(corners)
        square = (
            corners + np.roll(corners, -1, 0) + np.roll(corners, -1, 1) + np.roll(corners, (-1, -1), (0, 1))
        ) / 4
        square = square + amplitude * draw.uniform(-1, 1, (count, count))
        field[half::step, half::step] = square
        # Each middle of an edge lies between two corners and two centres.
        across = (corners + np.roll(corners, -1, 1) + square + np.roll(square, 1, 0)) / 4
        down = (corners + np.roll(corners, -1, 0) + square + np.roll(square, 1, 1)) / 4
        field[::step, half::step] = across + amplitude * draw.uniform(-1, 1, (count, count))
        field[half::step, ::step] = down + amplitude * draw.uniform(-1, 1, (count, count))
        amplitude, step = amplitude * fainter, half
    field = field[: shape[0], : shape[1]]
    return (field - field.min()) / max(float(np.ptp(field)), 1e-9)
