"""Retrieval without training: the revisited Oxford and Paris protocol, or classes of any labelled pictures.

With a ground truth (Radenović et al., arXiv 1803.11285): the queries, cropped to their box, rank all of the
database by cosine. mAP and precision at k in three ways: *easy* (easy pictures are to be found, hard ones
ignored), *medium* (both), *hard* (hard ones, easy ones ignored); junk is always ignored. DINO
(arXiv 2104.14294, sec. 4.2.1) and DINOv2 (2304.07193, sec. 7.3) report medium and hard.

Without one, what shares the query's class is to be found: mAP over the whole ranking, and recall@k, the share
of queries with one such picture among the first k (as metric learning counts it). `train=` is searched for
each picture of `test=`; `test=` alone, or a `data=` of one part, is searched for each of its own pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from dinov2.config import listed
from dinov2.data.decode import decode
from dinov2.data.sources import Source
from dinov2.exits import UserError
from dinov2.pages import Page
from evals.bench import Bench
from evals.config import place
from evals.descriptors import Describer, DescriptorConfig
from evals.found import Found, draw_found, in_rows, shown_of
from evals.layouts.labelled import open_labelled
from evals.layouts.revisited import Query, Revisited, find, ground_truth_in
from evals.ranking import ranked, revisited
from evals.results import Outcome
from evals.task import Task

AT_ONCE = 2**24  # similarities that are ranked at once
SETTINGS = {"easy": ("easy", "hard"), "medium": ("", ""), "hard": ("hard", "easy")}


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig(DescriptorConfig):
    ground_truth: str | None = place()  # gnd_….pkl or .json; null: the one in data=, or else labels
    k: list[int] = listed(1, 5, 10)  # of recall@k, and of mP@k

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.k or min(self.k) < 1:
            raise UserError(f"k={self.k}: give one or more numbers from 1 up")


@dataclass(frozen=True)
class Classes:
    """Labelled queries, and what is searched; None: the queries themselves, each without itself."""

    queries: Source
    database: Source | None

    @property
    def sources(self) -> dict[str, Source]:
        return {"test": self.queries} | ({"train": self.database} if self.database else {})


def open_sets(config: RetrievalConfig) -> Revisited | Classes:
    """What the settings name: a data set with a ground truth, or labelled pictures.

    Raises:
        UserError: nothing is named, pictures have no labels, or the ground truth does not fit.
    """
    cache = Path(config.cache) if config.cache else None
    if config.data is None and config.test is None:
        raise UserError("give data=ROOT (with a gnd file, or labelled pictures), or test=… (and train=…)")
    if config.data is not None and (config.train or config.test):
        raise UserError("give data=, or train= and test=, not both")
    if config.data is not None:
        root = Path(config.data).expanduser()
        truth = Path(config.ground_truth) if config.ground_truth else ground_truth_in(root)
        if truth is not None:
            return find(root, truth, cache)
        return _labelled(*_parts(open_labelled(config.data, cache)))
    if config.ground_truth:
        raise UserError("ground_truth= goes with data=ROOT, the folder of its pictures")
    database = open_labelled(config.train, cache) if config.train else None
    return _labelled(open_labelled(str(config.test), cache), database)


def run(bench: Bench, sets: Revisited | Classes, config: RetrievalConfig, work: Path) -> Outcome:
    """mAP, and precision or recall among the first k."""
    describer = Describer(bench, config)
    if isinstance(sets, Revisited):
        return _revisited(describer, sets, config)
    return _classes(describer, sets, config)


def _revisited(describer: Describer, sets: Revisited, config: RetrievalConfig) -> Outcome:
    ids, base = describer.source(sets.database)
    if len(ids) != len(sets.database):
        raise UserError(
            f"{len(sets.database) - len(ids)} pictures of the database cannot be read; get them again"
        )
    queries = torch.stack(
        [_boxed(describer, sets.queries, row, query) for row, query in enumerate(sets.truth)]
    )
    order = (queries @ base.T).argsort(dim=1, descending=True, stable=True)
    ranks = order.argsort(dim=1).numpy()
    scores: dict[str, NDArray[Any]] = {}
    for setting, (wanted, ignored) in SETTINGS.items():
        found = [
            revisited(*_places(rank, query, wanted, ignored), tuple(config.k))
            for rank, query in zip(ranks, sets.truth, strict=True)
        ]
        counted = [one for one in found if not np.isnan(one[0])]
        if counted:
            scores[f"map_{setting}"] = np.array([precision for precision, _ in counted])
            for k in config.k:
                scores[f"mp@{k}_{setting}"] = np.array([at[k] for _, at in counted])
    if not scores:
        raise UserError("the ground truth has nothing to be found for any query")
    headline = "map_medium" if "map_medium" in scores else next(iter(scores))

    def draw(page: Page) -> None:
        relevant = [sorted(query.easy | query.hard) for query in sets.truth]
        found = [
            Found(row, order[row].tolist(), set(wanted)) for row, wanted in enumerate(relevant) if wanted
        ]
        both = shown_of(sets.queries), shown_of(sets.database)
        draw_found(page, *both, found, ignored=[query.junk for query in sets.truth])

    return Outcome(
        headline=headline,
        metrics={name: 100 * float(values.mean()) for name, values in scores.items()},
        scores=scores,
        details={"queries": {name: len(values) for name, values in scores.items() if name.startswith("map")}},
        draw=draw,
    )


def _places(
    rank: NDArray[np.int64], query: Query, wanted: str, ignored: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ranks of what is to be found and of what does not count."""
    positive = getattr(query, wanted) if wanted else query.easy | query.hard
    junk = query.junk | (getattr(query, ignored) if ignored else frozenset())
    return rank[sorted(positive)], rank[sorted(junk - positive)]


def _boxed(describer: Describer, queries: Source, row: int, query: Query) -> Float[Tensor, "dim"]:
    image = decode(queries.read(row))
    if query.box is not None:
        left, top, right, bottom = query.box
        # As pixels: a box may reach past the picture, which would come out black.
        edges = (
            round(left),
            round(top),
            max(round(right), round(left) + 1),
            max(round(bottom), round(top) + 1),
        )
        inside = max(0, edges[0]), max(0, edges[1]), min(image.width, edges[2]), min(image.height, edges[3])
        if inside[0] >= inside[2] or inside[1] >= inside[3]:
            raise UserError(
                f"the box of query {row} lies outside its picture of {image.width} x {image.height}"
            )
        image = image.crop(inside)
    return describer.picture(image)


def _classes(describer: Describer, sets: Classes, config: RetrievalConfig) -> Outcome:
    ids, queries = describer.source(sets.queries)
    base_ids, base = (ids, queries) if sets.database is None else describer.source(sets.database)
    classes = sorted({*map(str, sets.queries.labels()), *map(str, (sets.database or sets.queries).labels())})
    truth = _numbers(sets.queries, ids, classes)
    labels = truth if sets.database is None else _numbers(sets.database, base_ids, classes)
    precision, first = _searched(queries, base, truth, labels, sets.database is None)
    counted = ~np.isnan(precision)
    if not counted.any():
        raise UserError(f"no picture of {sets.queries.name} has another of its class to be found")
    scores = {"map": precision[counted]} | {
        f"recall@{k}": (first[counted] < k).astype(np.float64) for k in config.k
    }

    def draw(page: Page) -> None:
        rows = np.flatnonzero(counted)
        shown = rows[np.linspace(0, len(rows) - 1, min(len(rows), 600)).astype(int)]
        found = []
        for row in shown.tolist():
            similarity = base @ queries[row]
            if sets.database is None:
                similarity[row] = -torch.inf
            best = similarity.topk(min(8, len(base))).indices.tolist()
            found.append(Found(row, best, {one for one in best if labels[one] == truth[row]}))
        both = in_rows(sets.queries, ids), in_rows(sets.database or sets.queries, base_ids)
        names = [classes[int(one)] for one in truth]
        draw_found(page, shown_of(both[0]), shown_of(both[1]), found, names=names)

    return Outcome(
        headline="map",
        metrics={name: 100 * float(values.mean()) for name, values in scores.items()},
        scores=scores,
        details={"classes": len(classes), "queries": int(counted.sum()), "alone": int((~counted).sum())},
        draw=draw,
    )


def _searched(
    queries: Float[Tensor, "n dim"],
    base: Float[Tensor, "m dim"],
    truth: Int[Tensor, "n"],
    labels: Int[Tensor, "m"],
    without_self: bool,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Average precision and rank of the first hit of each query, a few queries at a time."""
    precision, first = [], []
    for start in range(0, len(queries), step := max(1, AT_ONCE // len(base))):
        part = slice(start, start + step)
        relevant = truth[part, None] == labels[None]
        own = None
        if without_self:
            own = torch.zeros_like(relevant)
            rows = torch.arange(len(relevant))
            own[rows, rows + start] = True
        found = ranked(queries[part] @ base.T, relevant, own)
        precision.append(found.precision)
        first.append(found.first)
    return torch.cat(precision).double().numpy(), torch.cat(first).numpy()


def _numbers(source: Source, ids: Sequence[str], classes: list[str]) -> Int[Tensor, "n"]:
    numbers = {name: number for number, name in enumerate(classes)}
    labels = dict(zip(source.ids, source.labels(), strict=True))
    return torch.tensor([numbers[str(labels[id_])] for id_ in ids])


def _parts(source: Source) -> tuple[Source, Source | None]:
    splits = source.table["split"].to_pylist()
    second = next((name for name in ("val", "test") if name in splits), None)
    if second is None or "train" not in splits:
        return source, None
    rows = [[row for row, name in enumerate(splits) if name == part] for part in (second, "train")]
    return source.select(rows[0]), source.select(rows[1])


def _labelled(queries: Source, database: Source | None) -> Classes:
    for source in filter(None, (queries, database)):
        if missing := sum(not label for label in source.labels()):
            raise UserError(
                f"{missing:,} of {len(source):,} pictures of {source.name} have no label; put each class "
                "into a folder of its own, or give a ground truth"
            )
    return Classes(queries, database)


TASK = Task(RetrievalConfig, open_sets, run, "finding what shows the same")
