"""Accuracy against the size of the input: what a backbone makes of more or fewer pixels.

At each size test pictures are embedded anew; the head learns from training pictures of that size too, or
(`learnt_at=size`) from those of the settings' own `size` alone, which asks more: that features stay in place.
(DINOv2, arXiv 2304.07193, sec. 6.6, has the first for a linear head.)
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinov2.config import listed, one_of
from dinov2.exits import UserError
from dinov2.pages import Page
from dinov2.pages.charts import curve
from evals.backbones import PIXELS
from evals.bench import Bench
from evals.data import Parts, labelled_parts
from evals.drawing import draw_classification
from evals.probes import ProbeConfig, learnt
from evals.results import Outcome
from evals.task import Task
from evals.vectors import vectors_of

LEARNT_AT = ("each", "size")


@dataclass(frozen=True, kw_only=True)
class ResolutionConfig(ProbeConfig):
    sizes: list[int] = listed(112, 168, 224, 336, 448)  # brought to the nearest multiple of the patch
    learnt_at: str = "each"  # the head learns at each size, or once at `size`

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.learnt_at, LEARNT_AT, "learnt_at")
        if not self.sizes or min(self.sizes) < 1:
            raise UserError(f"sizes={self.sizes}: give one or more numbers of pixels")


def run(bench: Bench, parts: Parts, config: ResolutionConfig, work: Path) -> Outcome:
    """Top-1 accuracy at each size, and their mean, which is the headline."""
    patch = 1 if config.backbone == PIXELS else bench.backbone.patch_size
    sizes = sorted({max(1, round(size / patch)) * patch for size in config.sizes})
    probe = None
    if config.learnt_at == "size":
        probe = learnt(vectors_of(bench, parts.train, config.token), bench, parts, config, work / "size")
    answers, truth, ids = {}, None, []
    for size in sizes:
        test = vectors_of(bench, parts.test, config.token, size)
        here = probe
        if here is None:
            train = vectors_of(bench, parts.train, config.token, size)
            here = learnt(train, bench, parts, config, work / str(size))
        answers[size], truth, ids = here(test.rows), test.labels, test.ids
    assert truth is not None  # there is a size
    scores = {f"top1_{size}": (one == truth).double().numpy() for size, one in answers.items()}
    scores = {"mean": np.mean(list(scores.values()), axis=0), **scores}
    metrics = {name: 100 * float(values.mean()) for name, values in scores.items()}

    def draw(page: Page) -> None:
        page.heading("Accuracy by size")
        line = sizes, [metrics[f"top1_{size}"] for size in sizes]
        page.figure(curve({"": line}, x="pixels along a side", y="top-1, %"))
        best = max(sizes, key=lambda size: metrics[f"top1_{size}"])
        draw_classification(page, parts, ids, truth, answers[best])

    return Outcome(
        headline="mean", metrics=metrics, scores=scores, details={"sizes": sizes, **parts.details}, draw=draw
    )


TASK = Task(ResolutionConfig, labelled_parts, run, "accuracy by the size of the input")
