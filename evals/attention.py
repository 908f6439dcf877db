"""Objects in the self-attention of the CLS token (DINO, arXiv 2104.14294, sec. 4.2.2 and fig. 4).

Of each head of the last block, the fewest patches that hold 60% of the attention to patches are a mask. What
is measured is its Jaccard index with the mask of the picture's objects, all of them together, at the size of
the picture. `jaccard` takes the best head of each picture, as the paper's figure shows; `jaccard_one_head` is
of the head that is best on all pictures together, and so chosen on the pictures that are scored.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from dinov2.config import listed
from dinov2.console import progress
from dinov2.exits import UserError
from dinov2.features import PRECISIONS
from dinov2.pages import Card, Page
from dinov2.pictures import attention, attention_maps, most_attended
from evals.bench import Bench
from evals.dense_data import MASK, DensePart, LayoutConfig, open_part
from evals.dense_drawing import covered, evenly, worst
from evals.layouts import TEST
from evals.ranks import dealt
from evals.results import Outcome
from evals.task import Task

OVER = np.array([[235, 60, 40]], dtype=np.uint8)
SIDE = 128
PIECE = 64  # pictures that one rank measures at a time


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(LayoutConfig):
    size: int = 480  # pixels of a picture's short side, rounded to whole patches
    mass: float = 0.6  # share of the attention that a mask holds
    background: list[int] = listed(0)  # ids of masks that are no object
    ignore: list[int] = listed()  # ids that count for nothing, beside those of the layout and 255

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mass < 1:
            raise UserError(f"mass={self.mass}: give a share between 0 and 1")


@dataclass(frozen=True)
class Objects:
    """Pictures, and where their objects are."""

    part: DensePart
    background: list[int]

    @property
    def sources(self) -> dict[str, DensePart]:
        return {"test": self.part}

    def __len__(self) -> int:
        return len(self.part)

    def of(self, row: int, size: tuple[int, int]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which pixels are of an object, and which ones count."""
        ids = self.part.ids(row, size)
        counted = ~np.isin(ids, sorted(self.part.part.ignored))
        return counted & ~np.isin(ids, self.background), counted


def data(config: AttentionConfig) -> Objects:
    return Objects(open_part(config, TEST, MASK, config.ignore), config.background)


def run(bench: Bench, objects: Objects, config: AttentionConfig, work: Path) -> Outcome:
    """Jaccard indices over the pictures that have an object."""
    rows, found = [], []
    pieces = [range(first, min(first + PIECE, len(objects))) for first in range(0, len(objects), PIECE)]
    with progress(total=len(objects), what="attention") as bar:
        for piece, measured in zip(pieces, dealt(bench, _measured, pieces, objects, config), strict=True):
            for row, scores in zip(piece, measured, strict=True):
                if scores is not None:
                    rows.append(row)
                    found.append(scores)
                bar.update()
    if not rows:
        raise UserError(f"no mask of {objects.part.place} has an object: see background= and ignore=")
    table = np.stack(found)
    scores = {
        "jaccard": table.max(1),
        "jaccard_one_head": table[:, table.mean(0).argmax()],
        "jaccard_mean": table.mean(1),
    }

    def draw(page: Page) -> None:
        _draw(page, bench, objects, config, rows, table)

    return Outcome(
        headline="jaccard",
        metrics={name: 100 * float(values.mean()) for name, values in scores.items()},
        scores=scores,
        details={"heads": (100 * table.mean(0)).tolist(), "pictures": len(rows)},
        draw=draw,
    )


@torch.no_grad()
def _measured(
    bench: Bench, piece: range, objects: Objects, config: AttentionConfig
) -> Iterator[NDArray[np.float64] | None]:
    """Each head's index for some pictures; None where there is no object."""
    dtype = PRECISIONS[config.precision]
    for row in piece:
        image = objects.part.image(row)
        truth, counted = objects.of(row, image.size)
        if not truth.any():
            yield None
            continue
        with torch.autocast(bench.device.type, dtype, enabled=dtype != torch.float32):
            maps = attention(bench.backbone, image, size=config.size)
        yield jaccard(attended(maps, config.mass, truth.shape), truth, counted)


def attended(maps: Tensor, mass: float, size: Sequence[int]) -> NDArray[np.bool_]:
    """The mask of each head, [heads, height, width]: a pixel is its patch's."""
    kept = most_attended(maps, mass)
    return interpolate(kept[None], size=tuple(size), mode="nearest-exact")[0].bool().cpu().numpy()


def jaccard(
    masks: NDArray[np.bool_], truth: NDArray[np.bool_], counted: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Intersection over union of each mask [masks, height, width] with the truth, where pixels count."""
    both = (masks & truth & counted).sum((1, 2))
    either = ((masks | truth) & counted).sum((1, 2))
    return both / np.maximum(either, 1)


def _draw(
    page: Page,
    bench: Bench,
    objects: Objects,
    config: AttentionConfig,
    rows: Sequence[int],
    table: NDArray[np.float64],
) -> None:
    page.heading("Heads")
    heads = [[number, f"{100 * value:.1f}%"] for number, value in enumerate(table.mean(0))]
    page.table(["head", "Jaccard"], heads, caption="The mean over all pictures.")
    page.heading("Pictures")
    best = table.max(1)
    kinds = {"The worst": worst(best), "Evenly drawn": evenly(len(rows))}
    for kind, places in kinds.items():
        cards = [_card(bench, objects, config, rows[place], table[place]) for place in places]
        caption = (
            f"{kind}: the object, the best head's mask and its attention, then each other head's attention"
        )
        page.gallery(cards, caption, columns=1, side=SIDE)


def _card(
    bench: Bench, objects: Objects, config: AttentionConfig, row: int, scores: NDArray[np.float64]
) -> Card:
    image = objects.part.image(row)
    truth, _ = objects.of(row, image.size)
    best = int(scores.argmax())
    maps = attention(bench.backbone, image, size=config.size)
    mask = attended(maps, config.mass, truth.shape)[best]
    heads = attention_maps(bench.backbone, image, size=config.size)
    others = [picture for number, picture in enumerate(heads) if number != best]
    shown = [_over(image, truth), _over(image, mask), heads[best], *others]
    return Card(shown, f"{objects.part.shown_name(row)}: head {best}, {100 * scores[best]:.1f}%")


def _over(image: Image.Image, mask: NDArray[np.bool_]) -> Image.Image:
    return covered(image, mask.astype(np.int64) - 1, OVER)


TASK = Task(AttentionConfig, data, run, "objects in the last block's attention")
