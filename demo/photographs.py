"""The photographs that scikit-image and scikit-learn carry in their packages, and drawings of no scene."""

import math
import random
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dinov2.exits import UserError

# Scenes that seeds ask for. Left out: motorcycle_right.png, which shows the scene of motorcycle_left.png, and
# brick.png, whose wall repeats itself, so that nobody could say which of its windows are copies.
WANTED = {
    "astronaut": "skimage/data/astronaut.png",
    "cameraman": "skimage/data/camera.png",
    "cat": "skimage/data/chelsea.png",
    "coffee": "skimage/data/coffee.png",
    "coins": "skimage/data/coins.png",
    "dahlia": "sklearn/datasets/images/flower.jpg",
    "galaxies": "skimage/data/hubble_deep_field.jpg",
    "grass": "skimage/data/grass.png",
    "gravel": "skimage/data/gravel.png",
    "motorcycle": "skimage/data/motorcycle_left.png",
    "pagoda": "sklearn/datasets/images/china.jpg",
    "retina": "skimage/data/retina.jpg",
    "rocket": "skimage/data/rocket.jpg",
    "tissue": "skimage/data/ihc.png",
}
UNWANTED = {  # photographs that no seed is like
    "cell": "skimage/data/cell.png",
    "clock": "skimage/data/clock_motion.png",
    "handwriting": "skimage/data/text.png",
    "moon": "skimage/data/moon.png",
    "page": "skimage/data/page.png",
}
INSIDE = {"retina": (206, 206, 1205, 1205)}  # of the disc; its edge against black looks the same all round
FEWEST = 8  # photographs; with fewer of them the packages are not what this was made for


def photographs(names: dict[str, str]) -> dict[str, Image.Image]:
    """Open those of the named photographs that the installed packages have, as RGB."""
    found = {label: path for label, name in names.items() if (path := _packaged(name)) is not None}
    return {label: Image.open(path).convert("RGB").crop(INSIDE.get(label)) for label, path in found.items()}


def wanted_photographs() -> dict[str, Image.Image]:
    found = photographs(WANTED)
    if len(found) < FEWEST:
        raise UserError(
            f"only {len(found)} of {len(WANTED)} photographs to cut the demo's pictures from are installed: "
            "install scikit-image (the extra 'demo') and scikit-learn, or name your own folder, images=DIR"
        )
    return found


def drawing(rng: random.Random, size: int) -> Image.Image:
    """A picture of no scene at all: noise, a slope of colour, stripes, or a chart."""
    return rng.choice((_noise, _slope, _stripes, _chart))(rng, size)


def _packaged(name: str) -> Path | None:
    package, _, rest = name.partition("/")
    spec = find_spec(package)
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((path for folder in folders if (path := Path(folder) / rest).is_file()), None)


def _noise(rng: random.Random, size: int) -> Image.Image:
    """Clouds of colour: random grids of several cell sizes, added up."""
    random_state = np.random.default_rng(rng.getrandbits(64))
    layers = [
        np.asarray(_smooth(random_state.integers(0, 256, (cells, cells, 3), np.uint8), size), np.float64)
        for cells in rng.sample((2, 4, 8, 16, 32), 2)
    ]
    return Image.fromarray(np.mean(layers, axis=0).astype(np.uint8))


def _smooth(cells: np.ndarray, size: int) -> Image.Image:
    return Image.fromarray(cells).resize((size, size), Image.Resampling.BICUBIC)


def _slope(rng: random.Random, size: int) -> Image.Image:
    corners = np.array([[_colour(rng), _colour(rng)], [_colour(rng), _colour(rng)]], np.uint8)
    return Image.fromarray(corners).resize((size, size), Image.Resampling.BILINEAR)


def _stripes(rng: random.Random, size: int) -> Image.Image:
    y, x = np.mgrid[:size, :size]
    turn, period = rng.uniform(0, math.pi), rng.uniform(4, size / 2)
    on = np.sin((x * math.cos(turn) + y * math.sin(turn)) * math.tau / period) > rng.uniform(-0.6, 0.6)
    return Image.fromarray(np.where(on[..., None], _colour(rng), _colour(rng)).astype(np.uint8))


def _chart(rng: random.Random, size: int) -> Image.Image:
    picture = Image.new("RGB", (size, size), _colour(rng))
    pen, bars = ImageDraw.Draw(picture), rng.randint(3, 12)
    for bar in range(bars):
        left, right = (bar + 0.15) * size / bars, (bar + 0.85) * size / bars
        pen.rectangle((left, rng.uniform(0.1, 0.9) * size, right, size), fill=_colour(rng))
    return picture


def _colour(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)
