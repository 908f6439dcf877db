"""What tasks with an answer for every pixel put on a result's page: truth beside answer, the worst first."""

import colorsys
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dinov2.pages import Card, Page
from evals.confusion import iou_of_classes, overlaps
from evals.dense_data import DensePart
from evals.drawing import MOST_CLASSES, confusion_chart

SHOWN = 6  # pictures of each kind
SIDE = 150  # pixels of a picture on the page
SWATCH = 22
COVER = 0.6  # of a colour over the picture
GOLDEN = 0.61803398875  # hues this far apart around the circle stay apart, however many there are
UNKNOWN = (90, 90, 90)  # where there is no truth


def palette(count: int) -> NDArray[np.uint8]:
    """A colour for each of `count` classes, [count, 3], the same for every page."""
    levels = ((0.75, 0.95), (0.95, 0.7), (0.45, 1.0))
    colours = [colorsys.hsv_to_rgb(number * GOLDEN % 1.0, *levels[number % 3]) for number in range(count)]
    return np.rint(255 * np.array(colours)).astype(np.uint8).reshape(count, 3)


def covered(
    image: Image.Image, classes: Int[NDArray[np.integer], "height width"], colours: NDArray[np.uint8]
) -> Image.Image:
    """The picture with the classes' colours over it; what is below 0 stays as it is."""
    small = _fitting(image)
    rows = np.linspace(0, classes.shape[0] - 1, small.height).round().astype(np.int64)
    columns = np.linspace(0, classes.shape[1] - 1, small.width).round().astype(np.int64)
    shown = classes[np.ix_(rows, columns)]
    pixels = np.asarray(small, dtype=np.float32)
    mixed = (1 - COVER) * pixels + COVER * colours[np.maximum(shown, 0)]
    return Image.fromarray(np.where((shown >= 0)[..., None], mixed, pixels).round().astype(np.uint8))


def draw_classes(page: Page, names: Sequence[str], matrix: Int[Tensor, "classes classes"]) -> None:
    """IoU of each class, and what its pixels were taken for."""
    page.heading("Classes")
    found, share = iou_of_classes(overlaps(matrix)).tolist(), matrix.sum(1) / matrix.sum().clamp(min=1)
    rows = []
    for number, name in enumerate(names):
        others = matrix[number].clone()
        others[number] = 0
        most = names[int(others.argmax())] if others.any() else "–"
        iou = "–" if np.isnan(found[number]) else f"{100 * found[number]:.1f}%"
        rows.append([name, iou, f"{100 * float(share[number]):.2f}%", most])
    page.table(["class", "IoU", "share of pixels", "most often taken for"], rows)
    if len(names) <= MOST_CLASSES:
        caption = "Rows: the class; columns: what its pixels were taken for, as a share of the row."
        page.figure(confusion_chart(matrix, names), caption)


def draw_masks(
    page: Page, part: DensePart, quality: Sequence[float], answer: Callable[[int], Tensor]
) -> None:
    """Pictures, their truth and their answer, by `quality` (NaN: nothing counts): the worst, and others."""
    colours = palette(len(part.part.classes))
    page.heading("Pictures")

    def card(row: int) -> Card:
        image = part.image(row)
        masks = [part.mask(row, image.size), answer(row).numpy()]
        pictures = [_fitting(image), *(covered(image, mask, colours) for mask in masks)]
        return Card(pictures, f"{part.shown_name(row)}: {100 * quality[row]:.1f}%")

    kinds = {"The worst": worst(quality), "Evenly drawn": evenly(len(part))}
    for kind, rows in kinds.items():
        caption = f"{kind}: the picture, the truth, the answer, and its mIoU over its own classes"
        page.gallery([card(row) for row in rows], caption, columns=2, side=SIDE)
    draw_legend(page, part.part.classes, colours)


def draw_legend(page: Page, names: Sequence[str], colours: NDArray[np.uint8]) -> None:
    swatches = [
        Card([Image.new("RGB", (SWATCH, SWATCH), tuple(map(int, colour)))], name)
        for name, colour in zip(names, colours, strict=True)
    ]
    page.gallery(swatches, "Colours", side=SWATCH)


def draw_depths(
    page: Page,
    part: DensePart,
    rmse: Sequence[float],
    answer: Callable[[int], NDArray[np.floating]],
    far: float,
) -> None:
    """Pictures, their depth and its estimate, the largest errors first."""
    page.heading("Pictures")

    def card(row: int) -> Card:
        image = part.image(row)
        truth, found = part.depth(row, image.size), answer(row)
        most = float(truth[(truth < far)].max(initial=1e-3))
        pictures = [_fitting(image), depth_map(truth, most), depth_map(found, most)]
        name = part.shown_name(row)
        return Card(pictures, f"{name}: RMSE {rmse[row]:.3g} m; dark 0 m, bright {most:.1f} m")

    kinds = {"The worst": worst(-np.asarray(rmse)), "Evenly drawn": evenly(len(part))}
    for kind, rows in kinds.items():
        caption = f"{kind}: the picture, its depth, the estimate; grey is unknown"
        page.gallery([card(row) for row in rows], caption, columns=2, side=SIDE)


def depth_map(metres: NDArray[np.floating], most: float) -> Image.Image:
    colours = colormaps["magma"](np.clip(metres / most, 0, 1))[..., :3]
    colours = np.rint(255 * colours).astype(np.uint8)
    colours[metres <= 0] = UNKNOWN
    return Image.fromarray(colours)


def worst(quality: Sequence[float] | NDArray[np.floating], count: int = SHOWN) -> list[int]:
    """Rows of the least quality, the least first; those without one are left out."""
    order = np.argsort(quality, kind="stable")
    return [int(row) for row in order if np.isfinite(quality[int(row)])][:count]


def evenly(pictures: int, count: int = SHOWN) -> list[int]:
    kept = min(pictures, count)
    return [number * pictures // kept for number in range(kept)]


def _fitting(image: Image.Image) -> Image.Image:
    """Not much larger than it is shown, so that a page of large pictures is made quickly."""
    small = image.copy()
    small.thumbnail((2 * SIDE, 2 * SIDE), Image.Resampling.BICUBIC)
    return small
