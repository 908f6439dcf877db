"""Copy detection without training: which picture is an edited copy of which.

Three kinds of data:
- Copydays (`data=ROOT`): each original ranks the copies of one attack, together with `distractors=`; mAP
  over the originals and the strengths of an attack. DINO (arXiv 2104.14294, sec. 4.2.2) reports `strong`
  with 10,000 distractors, CLS and GeM-pooled patches, whitened with 20,000 other pictures (`train=`).
- Pairs (`queries= references= ground_truth=`), as DISC21: micro-AP over all pairs in one ranking, which asks
  for scores that mean the same for every query (arXiv 2106.09672).
- Any pictures (`data=`): copies of sixteen kinds are made on the fly. As in DISC, half of what is copied has
  no original among the references, and must not be found. It says what a backbone tells apart in pictures of
  this kind; how hard it is depends on them, so compare backbones by it, not data.

Score normalisation (DISC sec. 5; SSCD, arXiv 2202.10261, sec. 5): `background=` pictures, which are copies of
nothing, tell how near a query is to just anything; the mean of its largest similarities to them is taken off.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from dinov2.config import at_least
from dinov2.data.copies import KINDS, copy_of
from dinov2.data.decode import decode
from dinov2.data.order import derive_seed
from dinov2.data.sources import Source, open_source
from dinov2.exits import UserError
from dinov2.neighbours import nearest
from dinov2.pages import Page
from evals.bench import Bench
from evals.config import place
from evals.descriptors import Describer, DescriptorConfig, Whitening
from evals.found import Found, draw_found, in_rows, shown_of
from evals.judged import Judged, draw_scores, outcome_of
from evals.layouts import copy_pairs, copydays
from evals.layouts.copy_pairs import CopyPairs
from evals.layouts.copydays import Copydays
from evals.ranking import ranked
from evals.results import Outcome
from evals.task import Task

LEAST = 32  # pixels of the short side of what is copied; smaller pictures are enlarged first
Change = Callable[[Float[Tensor, "n dim"]], Float[Tensor, "n dim"]]


@dataclass(frozen=True, kw_only=True)
class CopydetectConfig(DescriptorConfig):
    token: str = "cls+gem"  # what is compared: cls, mean or gem of the patches, joined by +
    fit: str = "square"  # the whole picture as a square, or with its longest side of size; or crop
    queries: str | None = place()  # pictures that may be copies, for ground_truth=
    references: str | None = place()  # what they may be copies of
    ground_truth: str | None = place()  # CSV with the columns query_id, reference_id
    distractors: str | None = place()  # further pictures to be confused with, for data=
    background: str | None = place()  # pictures for score normalisation; null: none
    whiten: int | None = None  # with train=: principal directions kept; null: all that it spreads in
    normalise: float = 1.0  # with background=: how much of the background's similarity is taken off
    normalise_k: int = 2  # of how many of the background's nearest it is the mean
    k: int = 10  # references that each query proposes
    copied: int = 100  # pictures of data= that are copied in all kinds, and as many that are not to be found

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "normalise_k", "k", "copied")


@dataclass(frozen=True)
class Sets:
    """What the settings name, opened: one of the three kinds, and what goes with it."""

    main: Copydays | CopyPairs | Source
    train: Source | None
    background: Source | None
    distractors: Source | None

    @property
    def sources(self) -> dict[str, Any]:
        main = self.main
        named = main.sources if isinstance(main, CopyPairs) else {}
        named |= {"data": main.source if isinstance(main, Copydays) else main} if not named else {}
        others = {name: getattr(self, name) for name in ("train", "background", "distractors")}
        return named | {name: source for name, source in others.items() if source is not None}


def open_sets(config: CopydetectConfig) -> Sets:
    """What the settings name.

    Raises:
        UserError: nothing is named, or parts of two kinds are.
    """
    cache = Path(config.cache) if config.cache else None

    def opened(spec: str | None) -> Source | None:
        return open_source(spec, cache=cache) if spec else None

    pairs = (config.queries, config.references, config.ground_truth)
    if (config.data is None) == (not all(pairs)) or (config.data and any(pairs)):
        raise UserError("give data=… (Copydays, or any pictures), or queries=… references=… ground_truth=…")
    if config.test is not None:
        raise UserError("test= means nothing here: give data=, or queries= and references=")
    if config.distractors and not config.data:
        raise UserError("distractors= goes with data=; join further references to references= by a comma")
    others = opened(config.train), opened(config.background), opened(config.distractors)
    if config.data is None:
        queries, references = opened(config.queries), opened(config.references)
        assert queries is not None and references is not None
        return Sets(copy_pairs.find(queries, references, Path(str(config.ground_truth))), *others)
    root = Path(config.data).expanduser()
    main = copydays.find(root, cache) if copydays.here(root) else open_source(config.data, cache=cache)
    return Sets(main, *others)


def run(bench: Bench, sets: Sets, config: CopydetectConfig, work: Path) -> Outcome:
    """mAP of Copydays, or micro-AP of pairs."""
    describer = Describer(bench, config)
    change = _whitening(describer, sets.train, config)
    if isinstance(sets.main, Copydays):
        return _copydays(describer, change, sets.main, sets)
    if isinstance(sets.main, CopyPairs):
        return _published(describer, change, sets.main, sets, config)
    return _made(describer, change, sets.main, sets, config)


def _whitening(describer: Describer, train: Source | None, config: CopydetectConfig) -> Change:
    if train is None:
        if config.whiten is not None:
            raise UserError(f"whiten={config.whiten} needs train=, pictures that it is learnt from")
        return lambda vectors: vectors
    return Whitening.learnt(describer.source(train)[1], config.whiten)


def _copydays(describer: Describer, change: Change, days: Copydays, sets: Sets) -> Outcome:
    ids, vectors = describer.source(days.source)
    if len(ids) != len(days.source):
        raise UserError(f"{len(days.source) - len(ids)} pictures of Copydays cannot be read; get them again")
    vectors = change(vectors)
    others = change(describer.source(sets.distractors)[1]) if sets.distractors else vectors[:0]
    blocks = np.array(sorted(days.original))
    queries = vectors[[days.original[block] for block in blocks]]
    by_attack: dict[str, NDArray[np.float64]] = {}
    orders: dict[str, tuple[list[int], Tensor]] = {}
    for attack, some in days.copies.items():
        rows = [row for row, _ in some]
        relevant = torch.zeros(len(blocks), len(rows) + len(others), dtype=torch.bool)
        relevant[np.searchsorted(blocks, [block for _, block in some]), torch.arange(len(rows))] = True
        scores = queries @ torch.cat([vectors[rows], others]).T
        by_attack[attack] = ranked(scores, relevant).precision.double().numpy()
        orders[attack] = rows, scores[:, : len(rows)].argsort(dim=1, descending=True, stable=True)
    kinds = sorted({attack.partition("/")[0] for attack in by_attack})
    means = {
        f"map_{kind}": np.nanmean([one for name, one in by_attack.items() if name.startswith(kind)], axis=0)
        for kind in kinds
    }
    scored = {name: values[~np.isnan(values)] for name, values in means.items()}
    headline = "map_strong" if "map_strong" in scored else next(iter(scored))

    def draw(page: Page) -> None:
        rows = [[name, f"{100 * np.nanmean(values):.1f}%"] for name, values in by_attack.items()]
        page.heading("By attack")
        page.table(["attack", "mAP"], rows)
        attack = "strong" if "strong" in orders else next(iter(orders))
        copies, order = orders[attack]
        owner = np.array([block for _, block in days.copies[attack]])
        found = [
            Found(query, order[query].tolist(), {*np.flatnonzero(owner == block).tolist()})
            for query, block in enumerate(blocks)
            if (owner == block).any()
        ]
        originals = days.source.select([days.original[block] for block in blocks])
        draw_found(page, shown_of(originals), shown_of(days.source.select(copies)), found)

    return Outcome(
        headline=headline,
        metrics={name: 100 * float(values.mean()) for name, values in scored.items()},
        scores=scored,
        details={"by attack": {name: 100 * float(np.nanmean(values)) for name, values in by_attack.items()}},
        draw=draw,
    )


def _published(
    describer: Describer, change: Change, pairs: CopyPairs, sets: Sets, config: CopydetectConfig
) -> Outcome:
    query_ids, queries = describer.source(pairs.queries)
    base_ids, base = describer.source(pairs.references)
    place_of = {id_: place for place, id_ in enumerate(base_ids)}
    ids = pairs.references.ids
    wanted_of = dict(zip(pairs.queries.ids, pairs.wanted, strict=True))
    # A copy that cannot be read is not found; so is one whose original cannot.
    total = sum(map(len, pairs.wanted))
    wanted = [{place_of[ids[row]] for row in wanted_of[id_] if ids[row] in place_of} for id_ in query_ids]
    judged = _judged(describer, change, queries, base, wanted, sets, config)
    both = in_rows(pairs.queries, query_ids), in_rows(pairs.references, base_ids)

    def draw(page: Page) -> None:
        draw_scores(page, judged)
        draw_found(page, shown_of(both[0]), shown_of(both[1]), judged.found())

    return outcome_of(judged, np.arange(len(queries)), total, {}, draw)


def _made(
    describer: Describer, change: Change, source: Source, sets: Sets, config: CopydetectConfig
) -> Outcome:
    chosen, hidden = _drawn(len(source), config)
    kept = np.setdiff1d(np.arange(len(source)), hidden)
    base_ids, base = describer.source(source.select(kept))
    if sets.distractors is not None:
        base = torch.cat([base, describer.source(sets.distractors)[1]])
    place_of = {id_: place for place, id_ in enumerate(base_ids)}
    copied = source.select(np.concatenate([chosen, hidden]))
    vectors, wanted, owner, kinds, ids = [], [], [], [], copied.ids
    row_of = {id_: row for row, id_ in enumerate(ids)}
    for kind in KINDS:
        found, some = describer.source(copied, Copied(kind, config.seed), copy=kind, seed=config.seed)
        vectors.append(some)
        wanted += [{place_of[id_]} if id_ in place_of else set() for id_ in found]
        owner += [row_of[id_] for id_ in found]
        kinds += [kind] * len(found)
    judged = _judged(describer, change, torch.cat(vectors), base, wanted, sets, config)
    owners, names = np.array(owner), np.array(kinds)
    by_kind = {kind: judged.part(names == kind) for kind in KINDS}

    def show_copy(row: int) -> Image.Image:
        return Copied(kinds[row], config.seed)(decode(copied.read(owner[row])))

    def show_reference(row: int) -> Image.Image:
        if row < len(base_ids) or sets.distractors is None:
            return shown_of(in_rows(source, [base_ids[row]]))(0)
        return shown_of(sets.distractors)(row - len(base_ids))

    def draw(page: Page) -> None:
        page.heading("By kind of copy")
        page.table(
            ["copy", "micro-AP", "nearest is the original"],
            [
                [kind, f"{100 * one.micro_ap():.1f}%", f"{100 * one.first():.1f}%"]
                for kind, one in by_kind.items()
            ],
        )
        draw_scores(page, judged)
        draw_found(page, show_copy, show_reference, judged.found(), names=kinds)

    details = {
        "by kind": {
            kind: {"micro_ap": 100 * one.micro_ap(), "recall@1": 100 * one.first()}
            for kind, one in by_kind.items()
        },
        "copied": len(chosen),
        "copied without an original": len(hidden),
    }
    return outcome_of(judged, owners, sum(map(len, wanted)), details, draw)


@dataclass(frozen=True)
class Copied:
    """A copy of a picture, by kind, seed and its own pixels. Picklable, for the loader's workers."""

    kind: str
    seed: int

    def __call__(self, image: Image.Image) -> Image.Image:
        if min(image.size) < LEAST:
            image = ImageOps.scale(image, LEAST / min(image.size))
        own = int.from_bytes(sha256(image.tobytes()).digest()[:6])
        return copy_of(image, self.kind, derive_seed("copy", self.seed, own))


def _judged(
    describer: Describer,
    change: Change,
    queries: Tensor,
    base: Tensor,
    wanted: Sequence[set[int]],
    sets: Sets,
    config: CopydetectConfig,
) -> Judged:
    queries, device = change(queries), describer.bench.device
    scores, rows = (found.cpu() for found in nearest(queries, change(base), config.k, device=device))
    if sets.background is not None:
        others = change(describer.source(sets.background)[1])
        near, _ = nearest(queries, others, config.normalise_k, device=device)
        scores = scores - config.normalise * near.cpu().mean(1, keepdim=True)
    right = [[row in those for row in some] for some, those in zip(rows.tolist(), wanted, strict=True)]
    return Judged(
        scores.double().numpy(), rows.numpy(), np.array(right, dtype=bool), np.array([*map(len, wanted)])
    )


def _drawn(pictures: int, config: CopydetectConfig) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows to be copied, and rows to be copied and taken out of the references."""
    if pictures < 4:
        raise UserError(f"data= has {pictures} pictures; four are the least to copy some and hide others")
    count = min(config.copied, pictures // 4)
    order = np.random.default_rng([derive_seed("copies", config.seed)]).permutation(pictures)
    return np.sort(order[:count]), np.sort(order[count : 2 * count])


TASK = Task(CopydetectConfig, open_sets, run, "finding edited copies")
