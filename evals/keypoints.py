"""Semantic keypoints: does the nearest patch of another picture of the kind lie where the same part does?

SPair-71k (Min et al., arXiv 1908.10543). Each keypoint of the source picture has the feature of its place,
bilinear between patches. Its prediction is the centre of the target's patch with the highest cosine. Nothing
is trained. PCK@a is the share of keypoints predicted within a times the longer side of the target's object
(`bbox`) or of the target picture (`img`), as a mean over pairs (`pck`), or over all points alike (`point`):
papers differ in that, and in the layer and the size. A prediction is never finer than a patch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import grid_sample, normalize

from dinov2.config import at_least, listed, one_of
from dinov2.console import progress
from dinov2.data.decode import Unreadable, decode
from dinov2.exits import UserError
from dinov2.features import PRECISIONS
from dinov2.pages import Card, Page
from evals.bench import Bench
from evals.config import EvalConfig
from evals.descriptors import Whole
from evals.layouts.spair import SPLITS, Pair, Pairs, find
from evals.results import Outcome
from evals.task import Task

SHOWN, SIDE = 6, 300  # pairs of each kind, pixels of each picture
COLOURS = ("#2d8a5f", "#c23f55")  # right, wrong


@dataclass(frozen=True, kw_only=True)
class KeypointsConfig(EvalConfig):
    split: str = "test"  # or val, train
    fit: str = "square"  # the whole picture as a square of size pixels, or with its longest side of it
    layer: int = 1  # of which block from the end the patches are taken, after the final norm
    alphas: list[float] = listed(0.1, 0.05)  # of PCK; the first is the headline

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.split, SPLITS, "split")
        one_of(self.fit, ("square", "longest"), "fit")
        at_least(1, self, "layer")
        if not self.alphas or min(self.alphas) <= 0:
            raise UserError(f"alphas={self.alphas}: give one or more above 0")


def open_pairs(config: KeypointsConfig) -> Pairs:
    """Raises UserError: `data=` is missing, or no such folder."""
    if config.data is None or config.train or config.test:
        raise UserError("give data=ROOT, the folder of JPEGImages and PairAnnotation")
    return find(Path(config.data).expanduser(), config.split)


def run(bench: Bench, pairs: Pairs, config: KeypointsConfig, work: Path) -> Outcome:
    """PCK of each pair, at each threshold."""
    maps = _Maps(bench, config)
    errors: list[NDArray[np.float64]] = []  # of each pair, pixels of the target
    sizes: list[tuple[int, int]] = []
    predicted: list[NDArray[np.float64]] = []
    ordered = sorted(pairs.pairs, key=lambda pair: (pair.category, pair.name))
    with progress(total=len(ordered), what="keypoints", unit="pair") as bar:
        for _, some in groupby(ordered, key=lambda pair: pair.category):
            for pair, points, size in maps.predictions(list(some)):
                errors.append(np.linalg.norm(points - pair.target_points, axis=1))
                predicted.append(points)
                sizes.append(size)
                bar.update()
    longest = {
        "bbox": np.array([max(p.box[2] - p.box[0], p.box[3] - p.box[1]) for p in ordered]),
        "img": np.array([max(size) for size in sizes]),
    }
    metrics: dict[str, float] = {}
    scores: dict[str, NDArray[np.float64]] = {}
    for alpha in config.alphas:
        for kind, sides in longest.items():
            right = [error <= alpha * side for error, side in zip(errors, sides, strict=True)]
            scores[f"pck@{alpha:g}_{kind}"] = np.array([one.mean() for one in right])
            metrics[f"point@{alpha:g}_{kind}"] = 100 * float(np.concatenate(right).mean())
    metrics |= {name: 100 * float(values.mean()) for name, values in scores.items()}
    headline = f"pck@{config.alphas[0]:g}_bbox"
    categories = np.array([pair.category for pair in ordered])
    by_category = {
        str(name): 100 * float(scores[headline][categories == name].mean()) for name in np.unique(categories)
    }

    def draw(page: Page) -> None:
        page.heading("By category")
        page.table(["category", headline], [[name, f"{value:.1f}%"] for name, value in by_category.items()])
        _draw_pairs(page, ordered, predicted, errors, config.alphas[0] * longest["bbox"], scores[headline])

    return Outcome(
        headline=headline,
        metrics=metrics,
        scores=scores,
        details={"by category": by_category, "points": int(sum(map(len, errors)))},
        draw=draw,
    )


class _Maps:
    """Feature maps of the pictures of one category at a time: each is in many pairs."""

    def __init__(self, bench: Bench, config: KeypointsConfig) -> None:
        self.bench, self.config, self.backbone = bench, config, bench.backbone
        if config.layer > self.backbone.n_blocks:
            raise UserError(f"layer={config.layer}: the backbone has {self.backbone.n_blocks} blocks")
        patch, square = self.backbone.patch_size, config.fit == "square"
        if square and config.size % patch:
            raise UserError(f"size={config.size} does not divide into the backbone's patches of {patch}")
        if len(self.backbone.normalisation[0]) != 3 or self.backbone.value_range:
            raise UserError(
                "keypoints reads pictures of 8 bits and three channels; this backbone's are others"
            )
        self.whole = Whole(config.size, square, patch)
        self.mean, self.std = (
            torch.tensor(values, device=bench.device).view(-1, 1, 1) for values in self.backbone.normalisation
        )

    def predictions(
        self, pairs: Sequence[Pair]
    ) -> Iterator[tuple[Pair, NDArray[np.float64], tuple[int, int]]]:
        """Each pair with the points found in its target, and the target's size in pixels."""
        known: dict[Path, tuple[Tensor, tuple[int, int]]] = {}
        for path in sorted({path for pair in pairs for path in (pair.source, pair.target)}):
            known[path] = self._map(path)
        for pair in pairs:
            (source, source_size), (target, target_size) = known[pair.source], known[pair.target]
            points = matched(source, target, pair.source_points, source_size, target_size)
            yield pair, points, target_size

    @torch.no_grad()
    def _map(self, path: Path) -> tuple[Float[Tensor, "dim rows columns"], tuple[int, int]]:
        try:
            image = decode(path.read_bytes())
        except (OSError, Unreadable) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        pixels = self.whole(image).to(self.bench.device).float() / 255
        dtype = PRECISIONS[self.config.precision]
        with torch.autocast(self.bench.device.type, dtype, enabled=dtype != torch.float32):
            (features,) = self.backbone.get_intermediate_layers(
                ((pixels - self.mean) / self.std)[None],
                [self.backbone.n_blocks - self.config.layer],
                reshape=True,
            )
        return normalize(features[0].float(), dim=0), image.size


def matched(
    source: Float[Tensor, "dim rows columns"],
    target: Float[Tensor, "dim rows2 columns2"],
    points: Float[np.ndarray, "points 2"],
    source_size: tuple[int, int],
    target_size: tuple[int, int],
) -> Float[np.ndarray, "points 2"]:
    """Where the source's points are in the target, x and y in pixels of the files: centres of patches.

    Sizes are width and height of the files. Of equal cosines the first in reading order is taken.
    """
    scale = torch.tensor(source_size, dtype=torch.float32)
    grid = 2 * (torch.from_numpy(points).float() + 0.5) / scale - 1  # -1 to 1 from edge to edge
    at = grid_sample(source[None], grid[None, None].to(source), padding_mode="border", align_corners=False)
    features = normalize(at[0, :, 0].T, dim=1)
    rows, columns = target.shape[1:]
    best = (features @ target.flatten(1)).argmax(dim=1).cpu().numpy()
    row, column = np.divmod(best, columns)
    width, height = target_size
    return np.stack([(column + 0.5) * width / columns - 0.5, (row + 0.5) * height / rows - 0.5], axis=1)


def _draw_pairs(
    page: Page,
    pairs: Sequence[Pair],
    predicted: Sequence[NDArray[np.float64]],
    errors: Sequence[NDArray[np.float64]],
    allowed: NDArray[np.float64],
    shares: NDArray[np.float64],
) -> None:
    """The best pairs and the worst: keypoints of the source, and where they were found."""
    page.heading("Pairs")
    order = np.argsort(-shares, kind="stable")
    few = min(SHOWN, len(order))
    for kind, rows in (("Best", order[:few]), ("Worst", order[::-1][:few])):
        cards = []
        for row in rows:
            pair, right = pairs[row], errors[row] <= allowed[row]
            pictures = [
                _dotted(pair.source, pair.source_points, right),
                _dotted(pair.target, predicted[row], right, pair.target_points),
            ]
            text = f"{pair.category}: {int(right.sum())} of {len(right)}"
            cards.append(Card(pictures=pictures, text=text, tone="good" if kind == "Best" else "bad"))
        caption = "left the source's keypoints, right where they were found (a line leads to where they are)"
        page.gallery(cards, f"{kind} pairs: {caption}", columns=2, side=SIDE)


def _dotted(
    path: Path,
    points: NDArray[np.float64],
    right: NDArray[np.bool_],
    truth: NDArray[np.float64] | None = None,
) -> Image.Image:
    image = decode(path.read_bytes())
    scale = SIDE / max(image.size)
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    draw = ImageDraw.Draw(small)
    for number, (x, y) in enumerate(points * scale):
        colour = COLOURS[0 if right[number] else 1]
        if truth is not None:
            draw.line((x, y, *(truth[number] * scale)), fill=colour, width=2)
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour, outline="white")
    return small


TASK = Task(KeypointsConfig, open_pairs, run, "the same part of another picture")
