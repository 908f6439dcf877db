"""Semantic segmentation on frozen patch tokens (DINOv2, arXiv 2304.07193, sec. 7.4).

`probe=linear` is the published protocol: batch norm and a linear layer on each patch token, its scores
enlarged to pixels, cross-entropy, pictures cut into overlapping windows of 512 pixels at the test. `ms=true`
is the published "+ms": tokens of the last four blocks, several scales and mirrored pictures at the test (with
`size=640` as published). Beside that: AdamW, a warm-up, pictures at half to twice their size, half of them
mirrored; no jitter of colours. `probe=ridge` and `probe=knn` ask the same question without training.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

from dinov2.config import at_least, listed
from dinov2.console import progress
from dinov2.exits import UserError
from dinov2.pages import Page
from evals.bench import Bench
from evals.bootstrap import of_sums
from evals.confusion import confusion, iou_of_classes, mean_accuracy, mean_iou, overlaps, pixel_accuracy
from evals.dense_config import DenseConfig
from evals.dense_data import IGNORED, Classes, DensePart, DenseParts, labelled_parts
from evals.dense_drawing import draw_classes, draw_masks
from evals.dense_fit import answered, by_patch, fit
from evals.dense_probes import Probe
from evals.patches import KeptTokens, PatchTokens, last_blocks
from evals.results import Outcome
from evals.task import Task
from evals.windows import Tiling, best_class, enlarged

FIGURES = {"miou": mean_iou, "mean_accuracy": mean_accuracy, "pixel_accuracy": pixel_accuracy}
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig(DenseConfig):
    size: int = 512  # pixels along a side of a window, rounded up to whole patches
    ignore: list[int] = listed()  # ids of masks that count for nothing, beside those of the layout and 255
    classes: int | None = None  # how many; null: as many as the layout has, or the training masks show
    ms: bool = False  # the tokens of 4 blocks, and the test at several scales
    scales: list[float] = listed(*SCALES)  # ms: of the test, each also mirrored
    blocks: int | None = None  # last blocks whose tokens are joined; null: 1, or 4 with ms

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes is not None:
            at_least(1, self, "classes")
        if self.blocks is not None:
            at_least(1, self, "blocks")
        if not self.scales or min(self.scales) <= 0:
            raise UserError(f"scales={self.scales}: give one or more above 0")


def data(config: SegmentationConfig) -> DenseParts:
    return labelled_parts(config, config.ignore, config.classes)


@dataclass(frozen=True)
class ClassTarget:
    """Classes of pixels as what is to be learnt; see `evals.dense_fit.Target`."""

    outputs: int
    scales: tuple[float, float] = (0.5, 2.0)
    nothing: float = IGNORED

    @property
    def solved(self) -> int:
        return self.outputs

    def truth(self, part: DensePart, row: int, size: tuple[int, int]) -> Classes:
        return part.mask(row, size)

    def loss(self, scores: Float[Tensor, "batch classes rows columns"], truth: Tensor) -> Float[Tensor, ""]:
        """Mean cross-entropy of the pixels that count; 0 where none does."""
        large = interpolate(scores, size=truth.shape[1:], mode="bilinear", align_corners=False)
        total = cross_entropy(large, truth.long(), ignore_index=IGNORED, reduction="sum")
        return total / (truth != IGNORED).sum().clamp(min=1)

    def of_patches(self, truth: Tensor, patch: int) -> tuple[Tensor, Tensor]:
        """Which share of a patch's pixels each class has; what counts is the share that is not ignored."""
        pixels = by_patch(truth, patch).long()
        counts = torch.zeros(len(pixels), self.outputs + 1)
        counts.scatter_add_(
            1, pixels.remainder(self.outputs + 1), torch.ones_like(pixels, dtype=torch.float32)
        )
        known = counts[:, :-1].sum(1)  # ignored pixels, -1, are in the last column
        return counts[:, :-1] / known.clamp(min=1)[:, None], known / patch**2


def run(bench: Bench, parts: DenseParts, config: SegmentationConfig, work: Path) -> Outcome:
    """mIoU over the classes of the test part, from the pixels of all its pictures together."""
    blocks = config.blocks or (4 if config.ms else 1)
    tokens = PatchTokens(bench, config, blocks=last_blocks(bench.backbone.n_blocks, blocks))
    classes = len(parts.classes)
    probe = fit(bench, tokens, parts.train, ClassTarget(classes), config, work)
    answers = _Answers(tokens, probe, parts.test, config)
    total, overlap = torch.zeros(classes, classes, dtype=torch.int64), []
    with progress(total=len(parts.test), what="segmentation") as bar:
        for row, size, answer in answers:
            matrix = confusion(torch.from_numpy(parts.test.mask(row, size)), answer, classes)
            total += matrix
            overlap.append(overlaps(matrix))
            bar.update()
    sums = torch.stack(overlap)
    if not total.any():
        raise UserError(f"no pixel of the test part ({parts.test.place}) counts: its masks are all ignored")

    def draw(page: Page) -> None:
        draw_classes(page, parts.classes, total)
        draw_masks(page, parts.test, [mean_iou(one) for one in sums], answers.of)

    return Outcome(
        headline="miou",
        metrics={name: 100 * figure(sums.sum(0)) for name, figure in FIGURES.items()},
        intervals={
            name: of_sums(sums.numpy(), partial(_percent, figure)) for name, figure in FIGURES.items()
        },
        details={"iou": _by_class(parts.classes, sums.sum(0)), "blocks": tokens.blocks},
        draw=draw,
    )


class _Answers:
    """The class of every pixel of the test pictures, int64 [height, width] on the CPU."""

    def __init__(
        self, tokens: PatchTokens, probe: Probe, part: DensePart, config: SegmentationConfig
    ) -> None:
        self.tokens, self.probe, self.part = tokens, probe, part
        self.scales = config.scales if config.ms else None
        self.kept = None if config.ms else KeptTokens(tokens, part)

    def __iter__(self) -> Iterator[tuple[int, tuple[int, int], Int[Tensor, "height width"]]]:
        """Row, (width, height) and answer of each picture in order."""
        if self.kept is not None:
            for row, tiling, found in self.kept.all():
                yield row, *self._of_tokens(tiling, found)
        elif self.scales is not None:
            for row in range(len(self.part)):
                yield row, *self._at_scales(self.part.image(row), self.scales)

    def of(self, row: int) -> Int[Tensor, "height width"]:
        image = self.part.image(row)
        if self.scales is not None:
            return self._at_scales(image, self.scales)[1]
        tiling = self.tokens.tiling(image.size)
        return self._of_tokens(tiling, self.tokens(tiling.cut(image)))[1]

    def _of_tokens(self, tiling: Tiling, found: Tensor) -> tuple[tuple[int, int], Tensor]:
        scores = tiling.stitch(answered(self.probe, found, tiling))
        return tiling.picture, best_class(scores, tiling.pixels).cpu()

    def _at_scales(self, image: Image.Image, scales: Sequence[float]) -> tuple[tuple[int, int], Tensor]:
        """The mean of the classes' probabilities over all sizes, upright and mirrored."""
        usual = self.tokens.tiling(image.size)
        total = torch.zeros((), device=self.tokens.bench.device)
        for scale in scales:
            tiling = self.tokens.tiling(image.size, scale)
            for mirrored in (False, True):
                shown = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image
                scores = answered(self.probe, self.tokens(tiling.cut(shown)), tiling)
                shares = enlarged(tiling.stitch(scores.softmax(1)), (usual.height, usual.width))
                total = total + (shares.flip(2) if mirrored else shares)
        return image.size, best_class(total, usual.pixels).cpu()


def _percent(figure: Callable[[Tensor], float], sums: NDArray[np.floating]) -> float:
    return 100 * figure(torch.from_numpy(sums))


def _by_class(names: Sequence[str], sums: Tensor) -> dict[str, float | None]:
    """IoU of each class in percent; None where neither truth nor answers have it."""
    found = iou_of_classes(sums).tolist()
    return {name: None if math.isnan(iou) else 100 * iou for name, iou in zip(names, found, strict=True)}


TASK = Task(SegmentationConfig, data, run, "classes of pixels: linear, ridge or k-NN")
