"""Linear classification on frozen features: a grid of heads, trained at once.

The published protocol (DINOv2, arXiv 2304.07193, sec. 7.1 and app. B.3; rates as its code has them): SGD with
momentum 0.9, no weight decay, a cosine schedule, 12,500 steps of 128 random resized crops; 13 learning rates
x (last 1 or 4 blocks) x (with or without the mean patch token); the best head on the validation part is
reported. That chooses on the pictures that are scored: `select=holdout` chooses on a part of the training
pictures instead.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int
from safetensors.torch import load_file
from safetensors.torch import save as as_safetensors
from torch import Tensor

from dinov2.config import at_least, listed, one_of, runtime
from dinov2.console import progress
from dinov2.data.order import Order, derive_seed
from dinov2.exits import UserError
from dinov2.features import Embeddings
from dinov2.files import write_bytes
from dinov2.pages import Page
from dinov2.parallel import world
from evals.bench import Bench
from evals.config import LabelledConfig
from evals.crops import crop_batches
from evals.data import Labelled, Parts, held_out, labelled_parts
from evals.drawing import draw_classification, draw_examples
from evals.heads import HeadGrid, Kind
from evals.per_class import mean_per_class
from evals.ranks import dealt
from evals.results import Outcome
from evals.task import Task

# Of the release, for a batch of 256; the paper writes 1e-4 to 0.5.
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
SELECT = ("test", "holdout")
TOGETHER = 32  # steps whose features a rank gives at once
Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class LinearConfig(LabelledConfig):
    iterations: int = 12_500  # steps of SGD
    batch_size: int = 128  # pictures a step
    learning_rates: list[float] = listed(*RATES)  # scaled by batch_size / 256
    blocks: list[int] = listed(1, 4)  # CLS tokens of so many last blocks; fewer where the backbone has fewer
    mean_patch: list[bool] = listed(False, True)  # with the mean patch token of the last block
    augment: bool = True  # random resized crops, through the backbone at every step; false: features once
    select: str = "test"  # the best head is chosen on the test part (published), or on a holdout of train
    holdout: float = 0.1  # share of each training class, for select=holdout
    save_every: int = runtime(500)  # steps that a killed command loses at most

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "iterations", "batch_size", "save_every")
        one_of(self.select, SELECT, "select")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise UserError(f"learning_rates={self.learning_rates}: give one or more above 0")
        if not self.blocks or min(self.blocks) < 1 or not self.mean_patch:
            raise UserError("blocks= and mean_patch= need one or more values, blocks from 1 up")
        if not 0 < self.holdout < 1:
            raise UserError(f"holdout={self.holdout}: give a share between 0 and 1")

    @property
    def rates(self) -> list[float]:
        return [rate * self.batch_size / 256 for rate in self.learning_rates]


def run(bench: Bench, parts: Parts, config: LinearConfig, work: Path) -> Outcome:
    """Top-1 accuracy of the head that is best on the selecting pictures; the details have that of every head.

    `work` is a folder for what a killed command continues from.
    """
    depth = bench.backbone.n_blocks
    blocks = sorted({min(one, depth) for one in config.blocks})
    token = f"cls{blocks[-1]}+mean"
    test = bench.features(parts.test.source, token)
    fit, held = _selecting(parts.train, config) if config.select == "holdout" else (parts.train, None)
    grid = HeadGrid(
        _kinds(test, blocks, sorted(set(config.mean_patch))),
        config.rates,
        len(parts.classes),
        iterations=config.iterations,
        seed=config.seed,
        device=bench.device,
    )
    _train(grid, bench, parts, fit, config, token, work / "heads.safetensors")

    truth = parts.test.labels(test.ids)
    answers, right = _score(grid, test, truth, parts.allowed)
    chosen_by = right
    if held is not None:
        found, rows = _features_of(bench, parts, held, config, token)
        chosen_by = _score(grid, found[rows], held.labels([found.ids[row] for row in rows]), parts.allowed)[1]
    best = int(chosen_by.double().mean(1).argmax())
    heads = [
        grid.describe(head)
        | {"top1": 100 * float(right[head].double().mean())}
        | ({"holdout_top1": 100 * float(chosen_by[head].double().mean())} if held is not None else {})
        | ({"diverged": True} if (answers[head] < 0).any() else {})
        for head in range(len(grid))
    ]

    def draw(page: Page) -> None:
        _draw_grid(page, grid, right)
        shown = answers[best].clamp(min=0)
        draw_classification(page, parts, test.ids, truth, shown)
        draw_examples(page, parts, test.ids, truth, shown)

    scores = right[best].double().numpy()
    mean_class, spread = mean_per_class(scores, truth)
    return Outcome(
        headline="top1",
        metrics={"top1": 100 * float(scores.mean()), "mean_class": mean_class},
        scores={"top1": scores},
        intervals={"mean_class": spread},
        details={"best": heads[best], "heads": heads, "selected_on": config.select, **parts.details},
        draw=draw,
    )


def _kinds(found: Embeddings, blocks: list[int], mean_patch: list[bool]) -> list[Kind]:
    """The kinds of feature. Each is one run of columns: CLS tokens lie from early to late, then the mean."""
    return [
        Kind(last, mean, found.columns(f"cls-{last}", "mean" if mean else "cls-1"))
        for last in blocks
        for mean in mean_patch
    ]


def _selecting(train: Labelled, config: LinearConfig) -> tuple[Labelled, Labelled]:
    """The training pictures without a share of each class, and that share."""
    held = held_out(train.labels(train.source.ids), config.holdout, config.seed, train.classes)
    kept = [train.source.select(np.flatnonzero(mask.numpy())) for mask in (~held, held)]
    return replace(train, source=kept[0]), replace(train, source=kept[1])


def _train(
    grid: HeadGrid, bench: Bench, parts: Parts, fit: Labelled, config: LinearConfig, token: str, saved: Path
) -> None:
    """Train the grid to its end, from where a killed command left it."""
    if saved.exists():
        grid.load_state(load_file(saved))
    batches = (_augmented if config.augment else _cached)(bench, parts, fit, config, token, grid.step)
    start, before = time.perf_counter(), bench.seconds.get("features", 0.0)
    with progress(total=grid.iterations, what="linear heads", unit="step", initial=grid.step) as bar:
        for features, labels in batches:
            grid.train_step(features.to(bench.device, torch.float32), labels.to(bench.device))
            bar.update()
            if grid.step % config.save_every == 0 or grid.step == grid.iterations:
                write_bytes(saved, as_safetensors({name: one.cpu() for name, one in grid.state().items()}))
    embedding = bench.seconds["features"] - before  # cached ones are had with the first batch
    bench.seconds["training"] = time.perf_counter() - start - embedding


def _augmented(
    bench: Bench, parts: Parts, fit: Labelled, config: LinearConfig, token: str, first: int
) -> Batches:
    """Features of random crops. Pictures of classes are those of the source, read as training goes."""
    steps = config.iterations - first if world() == 1 else TOGETHER
    ranges = [
        range(start, min(start + steps, config.iterations))
        for start in range(first, config.iterations, steps)
    ]
    for batches in dealt(bench, _of_crops, ranges, fit, config, token):
        yield from batches


def _of_crops(bench: Bench, steps: range, fit: Labelled, config: LinearConfig, token: str) -> Batches:
    embedder = bench.embedder(token)
    crops = crop_batches(
        fit.source,
        [fit.class_of[id_] for id_ in fit.source.ids],
        size=config.size,
        batch=config.batch_size,
        seed=derive_seed("linear", config.seed),
        start=steps.start,
        stop=steps.stop,
        workers=config.workers,
    )
    for pictures, labels in crops:
        found = embedder(pictures)
        yield (found if world() == 1 else found.cpu()), labels


def _cached(
    bench: Bench, parts: Parts, fit: Labelled, config: LinearConfig, token: str, first: int
) -> Batches:
    """Features of centre crops, computed once."""
    found, rows = _features_of(bench, parts, fit, config, token)
    labels = fit.labels([found.ids[row] for row in rows])
    order = Order(len(rows), derive_seed("linear", config.seed))
    for step in range(first, config.iterations):
        positions = range(step * config.batch_size, (step + 1) * config.batch_size)
        picked = np.array([order.sample(position) for position in positions])
        yield torch.from_numpy(found[rows[picked]]), labels[picked]


def _features_of(
    bench: Bench, parts: Parts, part: Labelled, config: LinearConfig, token: str
) -> tuple[Embeddings, np.ndarray]:
    """Features of a part of the training pictures: those of all, which other tasks share, and its rows."""
    if config.augment and part is not parts.train:
        found = bench.features(part.source, token)
        return found, np.arange(len(found))
    found = bench.features(parts.train.source, token)
    wanted = set(part.source.ids)
    return found, np.array([row for row, id_ in enumerate(found.ids) if id_ in wanted])


def _score(
    grid: HeadGrid,
    features: Embeddings | np.ndarray,
    truth: Int[Tensor, "n"],
    allowed: Bool[Tensor, "classes"],
) -> tuple[Int[Tensor, "heads n"], Tensor]:
    """Each head's answers, and where they are right."""
    rows = torch.from_numpy(np.array(features[:]))
    answers = grid.predict(rows, allowed).cpu()
    return answers, answers == truth


def _draw_grid(page: Page, grid: HeadGrid, right: Tensor) -> None:
    page.heading("All heads")
    top1 = (100 * right.double().mean(1)).view(len(grid.kinds), len(grid.rates))
    names = [
        f"{kind.blocks} block{'s' * (kind.blocks > 1)}{', mean patch' * kind.mean_patch}"
        for kind in grid.kinds
    ]
    rows = [
        [f"{rate:.3g}", *(f"{float(top1[kind, number]):.1f}" for kind in range(len(names)))]
        for number, rate in enumerate(grid.rates)
    ]
    page.table(
        ["learning rate", *names],
        rows,
        caption="Top-1 in percent on the test part. Rates are those of the batch size.",
    )


TASK = Task(LinearConfig, labelled_parts, run, "linear classification, a grid of heads")
