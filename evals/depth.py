"""Depth from one picture on frozen patch tokens (DINOv2, arXiv 2304.07193, sec. 7.4).

`probe=linear` is the published protocol: each patch token with the CLS token beside it, a linear layer to 256
bins of equal width, the maps enlarged four times, the depth as the bins' mean under linearly normalised
scores (AdaBins, arXiv 2011.14141). `blocks=1` is its "lin. 1"; `blocks=4` joins four blocks spread evenly
over the backbone, its "lin. 4", or the last four by `spread=false`. The loss is the scale-invariant one of
the logarithm (Eigen et al., arXiv 1406.2283, weighted as by AdaBins), without a loss of gradients.
`probe=ridge` and `probe=knn` answer in metres without training.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from dinov2.config import at_least, one_of
from dinov2.console import progress
from dinov2.exits import UserError
from dinov2.pages import Page
from evals.bench import Bench
from evals.bootstrap import of_sums
from evals.dense_config import DenseConfig
from evals.dense_data import DensePart, DenseParts, Metres, measured_parts
from evals.dense_drawing import draw_depths
from evals.dense_fit import answered, by_patch, fit
from evals.dense_probes import Probe
from evals.depth_metrics import CROPS, METRICS, NEAR, counted, errors
from evals.patches import KeptTokens, PatchTokens, last_blocks
from evals.results import Outcome
from evals.task import Task
from evals.windows import Tiling, enlarged

BINS, FLOOR, FINER = 256, 0.1, 4  # bins; what is added to a score above 0; how much maps are enlarged
VARIANCE, WEIGHT = 0.85, 10.0  # of the loss
UNITS = {"rmse": "m", "abs_rel": "", "log10": ""}


@dataclass(frozen=True, kw_only=True)
class DepthConfig(DenseConfig):
    size: int = 480  # pixels along a side of a window, rounded up to whole patches
    blocks: int = 1  # blocks whose tokens are joined; the published lin. 4 has 4
    spread: bool = True  # several blocks: spread evenly over the backbone, as published; false: the last
    metres: float | None = None  # of one unit of a stored depth; null: the layout's, or 0.001 of 16 bits
    far: float | None = None  # metres of the greatest depth that counts; null: the layout's, or 10
    crop: str | None = None  # pixels that count: none, eigen (NYUv2), garg (KITTI); null: the layout's

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "blocks")
        if self.crop is not None:
            one_of(self.crop, CROPS, "crop")
        for name in ("metres", "far"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise UserError(f"{name}={value}: give more than 0")


def data(config: DepthConfig) -> DenseParts:
    return measured_parts(config, config.metres)


@dataclass(frozen=True)
class DepthTarget:
    """Depths up to `far` metres as what is to be learnt; see `evals.dense_fit.Target`."""

    far: float
    outputs: int = BINS
    solved: int = 1
    scales: tuple[float, float] = (1.0, 1.0)  # a picture made larger would show other depths
    nothing: float = 0.0

    def truth(self, part: DensePart, row: int, size: tuple[int, int]) -> Metres:
        return part.depth(row, size)

    def known(self, truth: Tensor) -> Tensor:
        return (truth > NEAR) & (truth < self.far)

    def metres(self, scores: Float[Tensor, "batch outputs rows columns"]) -> Float[Tensor, "batch 1 h w"]:
        """The depth that outputs stand for: of bins their mean, on a finer grid; of one output, itself."""
        if scores.shape[1] == 1:
            return scores.clamp(NEAR, self.far)
        # Enlarged before the linear layer, as published, or after it is the same: this has less to multiply.
        large = interpolate(scores, scale_factor=FINER, mode="bilinear", align_corners=False)
        shares = large.relu() + FLOOR
        middles = NEAR + (torch.arange(BINS, device=scores.device) + 0.5) * (self.far - NEAR) / BINS
        return (torch.einsum("bnhw,n->bhw", shares, middles) / shares.sum(1))[:, None]

    def loss(self, scores: Float[Tensor, "batch bins rows columns"], truth: Tensor) -> Float[Tensor, ""]:
        """Root of the mean square less 0.85 of the squared mean of errors in the logarithm; 0 of no pixel."""
        where = self.known(truth)
        found = interpolate(self.metres(scores), size=truth.shape[1:], mode="bilinear", align_corners=False)
        if not where.any():
            return 0.0 * found.sum()
        error = found[:, 0][where].log() - truth[where].log()
        return WEIGHT * (error.square().mean() - VARIANCE * error.mean().square()).clamp(min=1e-12).sqrt()

    def of_patches(self, truth: Tensor, patch: int) -> tuple[Tensor, Tensor]:
        """The mean depth of a patch's pixels whose depth is known; what counts is their share."""
        pixels = by_patch(truth, patch)
        where = self.known(pixels)
        number = where.sum(1)
        return ((pixels * where).sum(1) / number.clamp(min=1))[:, None], number / patch**2


def run(bench: Bench, parts: DenseParts, config: DepthConfig, work: Path) -> Outcome:
    """Errors of depth, each a mean over the test pictures that have a pixel that counts."""
    blocks = last_blocks(bench.backbone.n_blocks, config.blocks, spread=config.spread)
    tokens = PatchTokens(bench, config, blocks=blocks, cls=True)
    layout = parts.test.part
    target = DepthTarget(config.far or layout.far)
    probe = fit(bench, tokens, parts.train, target, config, work)
    answers = _Answers(tokens, probe, target, parts.test)
    crop = config.crop or layout.crop
    found = []
    with progress(total=len(parts.test), what="depth") as bar:
        for row, size, answer in answers:
            truth = parts.test.depth(row, size)
            found.append(errors(truth, answer, counted(truth, far=target.far, crop=crop)))
            bar.update()
    table = np.stack(found)
    known = np.isfinite(table[:, 0])
    if not known.any():
        raise UserError(
            f"no pixel of the test part ({parts.test.place}) counts: look at metres=, far=, crop="
        )
    factor = np.array([100.0 if name.startswith("delta") else 1.0 for name in METRICS])

    def draw(page: Page) -> None:
        draw_depths(page, parts.test, table[:, 0].tolist(), answers.of, target.far)

    sums = np.concatenate([table[known] * factor, np.ones((known.sum(), 1))], axis=1)
    return Outcome(
        headline="rmse",
        metrics=dict(zip(METRICS, (factor * table[known].mean(0)).tolist(), strict=True)),
        units=UNITS,
        lower=tuple(UNITS),
        intervals={name: of_sums(sums, partial(_mean, place)) for place, name in enumerate(METRICS)},
        details={"blocks": tokens.blocks, "crop": crop, "far": target.far, "pictures": int(known.sum())},
        draw=draw,
    )


class _Answers:
    """The depth of every pixel of the test pictures in metres, float32 [height, width]."""

    def __init__(self, tokens: PatchTokens, probe: Probe, target: DepthTarget, part: DensePart) -> None:
        self.tokens, self.probe, self.target, self.part = tokens, probe, target, part
        self.kept = KeptTokens(tokens, part)

    def __iter__(self) -> Iterator[tuple[int, tuple[int, int], Metres]]:
        """Row, (width, height) and answer of each picture in order."""
        for row, tiling, found in self.kept.all():
            yield row, tiling.picture, self._of_tokens(tiling, found)

    def of(self, row: int) -> Metres:
        image = self.part.image(row)
        tiling = self.tokens.tiling(image.size)
        return self._of_tokens(tiling, self.tokens(tiling.cut(image)))

    def _of_tokens(self, tiling: Tiling, found: Tensor) -> Metres:
        depth = tiling.stitch(self.target.metres(answered(self.probe, found, tiling)))
        return enlarged(depth, tiling.pixels)[0].cpu().numpy()


def _mean(place: int, sums: NDArray[np.floating]) -> float:
    """Of sums over pictures, and of how many they are."""
    return float(sums[place] / sums[-1])


TASK = Task(DepthConfig, data, run, "depth of every pixel: linear, ridge or k-NN")
