"""Accuracy on corrupted pictures (ImageNet-C, arXiv 1903.12261): fifteen kinds at five strengths.

The head learns from clean pictures, and recognises test pictures that were cropped as always and corrupted
then. See `evals.corrupt` for how far the kinds are those of the published files.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dinov2.config import at_least, listed, one_of
from dinov2.console import progress
from dinov2.data.order import derive_seed
from dinov2.data.sources import Source
from dinov2.exits import UserError
from dinov2.features import CentreCrop, Embedder, as_tensor, embed_array
from dinov2.files import write_whole
from dinov2.pages import Card, Page
from evals.bench import Bench
from evals.corrupt import KINDS, corrupt
from evals.data import Parts, labelled_parts
from evals.drawing import THUMBNAIL, picture_of
from evals.probes import Probe, ProbeConfig, learnt
from evals.ranks import dealt
from evals.results import Outcome
from evals.task import Task
from evals.vectors import Vectors, vectors_of

Cell = tuple[str, int]  # a kind and a strength
SHOWN = 3  # the strength at which the page shows a picture


@dataclass(frozen=True, kw_only=True)
class CorruptionsConfig(ProbeConfig):
    kinds: list[str] = listed(*KINDS)
    strengths: list[int] = listed(1, 2, 3, 4, 5)
    pictures: int | None = None  # test pictures, drawn at random: each is embedded 75 times; null: all

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind in self.kinds:
            one_of(kind, KINDS, "kinds")
        if not self.kinds or not self.strengths or not set(self.strengths) <= set(range(1, 6)):
            raise UserError(f"strengths={self.strengths}: give some of 1 to 5, and one or more kinds")
        if self.pictures is not None:
            at_least(1, self, "pictures")


def data(config: CorruptionsConfig) -> Parts:
    """The labelled parts, the test part no larger than asked for."""
    parts = labelled_parts(config)
    if config.pictures is None or config.pictures >= len(parts.test.source):
        return parts
    generator = np.random.default_rng(derive_seed("pictures", config.seed))
    rows = np.sort(generator.choice(len(parts.test.source), config.pictures, replace=False))
    return replace(parts, test=replace(parts.test, source=parts.test.source.select(rows)))


def run(bench: Bench, parts: Parts, config: CorruptionsConfig, work: Path) -> Outcome:
    """Top-1 accuracy: the mean over kinds and strengths, that of each kind, and that of clean pictures."""
    train, test = (vectors_of(bench, part, config.token) for part in (parts.train, parts.test))
    probe = learnt(train, bench, parts, config, work)
    clean = (probe(test.rows) == test.labels).numpy()
    cells = [(kind, strength) for kind in config.kinds for strength in config.strengths]
    with bench.timed("corruptions"):
        right = _all_cells(bench, parts, config, test, probe, work, cells)
    scores = {
        kind: np.mean([right[kind, strength] for strength in config.strengths], axis=0)
        for kind in config.kinds
    }
    scores = {"mean": np.mean(list(scores.values()), axis=0), "clean": clean.astype(np.float64), **scores}
    table = {
        kind: {str(strength): 100 * float(right[kind, strength].mean()) for strength in config.strengths}
        for kind in config.kinds
    }

    def draw(page: Page) -> None:
        page.heading("Kinds and strengths")
        rows = [[kind, *(f"{value:.1f}" for value in by.values())] for kind, by in table.items()]
        page.table(["kind", *map(str, config.strengths)], rows, caption="Top-1 in percent")
        _gallery(page, parts, config, test.ids[0])

    return Outcome(
        headline="mean",
        metrics={name: 100 * float(values.mean()) for name, values in scores.items()},
        scores=scores,
        details={"top1": table, **parts.details},
        draw=draw,
    )


@dataclass(frozen=True)
class Corrupting:
    """A picture to what the embedder takes: cropped, corrupted, and prepared without another crop."""

    crop: CentreCrop
    kind: str
    strength: int
    seed: int
    prepare: Callable[[Image.Image], Tensor]  # leaves a picture of the crop's size as it is

    def __call__(self, image: Image.Image) -> Tensor:
        return self.prepare(self.picture(image))

    def picture(self, image: Image.Image) -> Image.Image:
        cropped = np.asarray(self.crop.picture(image))
        return Image.fromarray(corrupt(cropped, self.kind, self.strength, self.seed))


@dataclass(frozen=True)
class CorruptedEmbedder:
    """An embedder of corrupted pictures."""

    clean: Embedder
    prepare: Corrupting

    @property
    def dimension(self) -> int:
        return self.clean.dimension

    @property
    def meta(self) -> dict[str, Any]:
        return self.clean.meta | {"corruption": [self.prepare.kind, self.prepare.strength, self.prepare.seed]}

    def __call__(self, batch: Tensor) -> Float[Tensor, "n dim"]:
        return self.clean(batch)


def _all_cells(
    bench: Bench,
    parts: Parts,
    config: CorruptionsConfig,
    test: Vectors,
    probe: Probe,
    work: Path,
    cells: list[Cell],
) -> dict[Cell, Bool[NDArray, "n"]]:
    """Which test pictures are recognised under each corruption; what a killed command had done stays."""
    paths = {(kind, strength): work / f"{kind}-{strength}.npy" for kind, strength in cells}
    todo = [cell for cell, path in paths.items() if not path.exists()]
    found = dealt(bench, _embed_cell, todo, parts.test.source, config)
    with progress(total=len(cells), what="corruptions", unit="cell", initial=len(cells) - len(todo)) as bar:
        for cell, (ids, rows) in zip(todo, found, strict=True):
            if ids != test.ids:
                raise UserError(f"pictures of {parts.test.source.name} changed meanwhile; run it again")
            with write_whole(paths[cell]) as file:
                np.save(file, (probe(rows) == test.labels).numpy())
            bar.update()
    return {cell: np.load(path) for cell, path in paths.items()}


def _embed_cell(
    bench: Bench, cell: Cell, source: Source, config: CorruptionsConfig
) -> tuple[list[str], Float[Tensor, "n dim"]]:
    """Ids and features of the test pictures under one corruption."""
    clean = bench.embedder(config.token, resize=config.size)
    corrupted = CorruptedEmbedder(clean, _corrupting(config, *cell, clean.prepare))
    return embed_array(source, corrupted, batch=config.batch, workers=config.workers)


def _corrupting(
    config: CorruptionsConfig, kind: str, strength: int, prepare: Callable[[Image.Image], Tensor] = as_tensor
) -> Corrupting:
    resize = round(config.size * 256 / 224) if config.resize is None else config.resize
    return Corrupting(CentreCrop(config.size, resize), kind, strength, config.seed, prepare)


def _gallery(page: Page, parts: Parts, config: CorruptionsConfig, id_: str) -> None:
    """One test picture under each kind."""
    strength = SHOWN if SHOWN in config.strengths else config.strengths[0]
    picture = picture_of(parts.test, id_)
    cards = [
        Card(pictures=[_corrupting(config, kind, strength).picture(picture)], text=kind.replace("_", " "))
        for kind in config.kinds
    ]
    page.gallery(cards, f"A test picture under each kind, at strength {strength}", side=THUMBNAIL)


TASK = Task(CorruptionsConfig, data, run, "accuracy on corrupted pictures")
