"""What there is to look at: every copy, leak, group, cluster and answer to a seed, as ids and a line of text.

A listing has everything, up to `report.cards` items evenly spread; the page shows some of it, and the pages
beside it show all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from curation.calibrate import threshold_of
from curation.ingest import Ingested
from curation.near import Candidates, scores_of
from curation.report.pictures import SHOWN, Pictures
from curation.run import Run
from curation.views import OF_FIRST, TILES, TURNS
from dinov2.data.manifest import CLUSTERS_SCHEMA, EDGES_SCHEMA, read_format

Tone = Literal["good", "bad", "plain"]

NEAREST = 1000  # pairs on each side of a threshold
MEMBERS = 12  # pictures of a group
ANSWERS = 4  # pictures for a seed


@dataclass(frozen=True)
class Item:
    """Pictures side by side, or one mosaic of them, and what is to be said of them."""

    names: list[str]
    text: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class Listing:
    """Items in an order that means something, and what they are a selection of."""

    name: str  # of its pages
    title: str
    caption: str
    items: Sequence[Item]
    total: int
    ordered: bool = False  # the first items are those to be looked at; else some evenly from all
    mosaic: bool = False


def dropped(run: Run, stage: str, decisions: pa.Table, pictures: Pictures) -> Listing:
    """Pictures that lost to another, from the likest to the least alike."""
    table = decisions.filter(pc.equal(decisions["dropped_by"], stage))
    table = table.sort_by([("similarity", "descending"), ("id", "ascending")])
    rows = _spread(table, run.config.report.cards).to_pylist()
    items = [
        Item(
            [row["id"], row["evidence"]],
            f"{row['similarity']:.2f} · {short(row['uri'])} lost to {short(pictures.uri(row['evidence']))}",
            "bad",
        )
        for row in rows
    ]
    title = "Copies and what they lost to" if stage == "duplicates" else "Holdout leaks"
    caption = "Left dropped, right why; from the likest to the least alike."
    return Listing(stage, title, caption, items, len(table))


def near_threshold(run: Run, stage: str, candidates: Candidates, score: np.ndarray) -> Iterator[Listing]:
    """The candidate pairs nearest to the threshold, above and below it."""
    threshold = threshold_of(run, stage)
    first = Ingested(run, "pool").readable()["id"]
    second = first if stage == "duplicates" else Ingested(run, "holdout").readable()["id"]
    for side, chosen in (("above", score >= threshold), ("below", score < threshold)):
        rows = np.flatnonzero(chosen)
        rows = rows[np.argsort(np.abs(score[rows] - threshold), kind="stable")]
        items = [
            Item(
                [first[int(candidates.pairs[row, 0])].as_py(), second[int(candidates.pairs[row, 1])].as_py()],
                f"{score[row]:.3f} · cosine {candidates.cosine[row]:.2f} · "
                f"hashes {candidates.hamming[row]} bits apart{_seen(int(candidates.view[row]))}",
                "bad" if side == "above" else "good",
            )
            for row in rows[: min(NEAREST, run.config.report.cards)]
        ]
        what = "count as one picture" if stage == "duplicates" else "count as leaks"
        caption = (
            f"The pairs nearest to the threshold {side} it: these {what if side == 'above' else 'do not'}."
        )
        yield Listing(
            f"{stage}-{side}", f"{stage.capitalize()}, {side} the threshold", caption, items, len(items), True
        )


def components(run: Run) -> Listing | None:
    """Groups of three and more copies, the largest first."""
    path = run.stage("duplicates") / "components.parquet"
    if not path.exists():
        return None
    table = parquet.read_table(path)
    table = table.filter(pc.greater_equal(table["size"], 3))
    keys = [
        ("size", "descending"),
        ("component", "ascending"),
        ("kept", "descending"),
        ("similarity", "descending"),
    ]
    table = table.sort_by(keys)
    number = table["component"].to_numpy()
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    sizes = np.diff(np.append(starts, len(number)))
    items = []
    for start, size in list(zip(starts.tolist(), sizes.tolist(), strict=True))[: run.config.report.cards]:
        members = table.slice(start, size)
        least, diameter = pc.min(members["similarity"]).as_py(), members["diameter"][0].as_py()
        text = f"{size} pictures, diameter {diameter}, least likeness to the one kept {least:.2f}"
        items.append(Item(members["id"].slice(0, MEMBERS).to_pylist(), text))
    caption = "First the picture that stays. A chain shows as a large diameter and a low likeness."
    return Listing("groups", "The largest groups of copies", caption, items, len(starts), True)


def clusters(run: Run) -> Listing | None:
    """Clusters of the finest level, by the pictures nearest to their centroids."""
    path = run.folder / "clusters.parquet"
    if not path.exists():
        return None
    table = read_format(path, CLUSTERS_SCHEMA)
    levels = [name for name in table.column_names if name.startswith("level_")]
    table = table.sort_by([("level_0", "ascending"), ("distance", "ascending"), ("id", "ascending")])
    number = table["level_0"].to_numpy()
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    sizes = np.diff(np.append(starts, len(number)))
    order = _some(np.argsort(-sizes, kind="stable"), run.config.report.cards)
    items = [
        Item(
            table["id"].slice(int(starts[at]), min(int(sizes[at]), SHOWN)).to_pylist(),
            f"{sizes[at]:,} pictures",
        )
        for at in order.tolist()
    ]
    counts = ", ".join(f"{len(pc.unique(table[name])):,}" for name in levels)
    caption = (
        "From the largest to the smallest cluster, by the pictures nearest to the centroid. "
        f"Clusters on each level: {counts}."
    )
    return Listing("clusters", "Clusters", caption, items, len(starts), mosaic=True)


def retrieved(run: Run) -> Listing | None:
    """Seeds and the pictures that they asked for."""
    path = run.folder / "edges" / "retrieval.parquet"
    if not path.exists():
        return None
    edges = read_format(path, EDGES_SCHEMA)
    edges = edges.sort_by([("a", "ascending"), ("similarity", "descending"), ("b", "ascending")])
    codes = edges["a"].combine_chunks().dictionary_encode().indices.to_numpy()
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    sizes = np.diff(np.append(starts, len(codes)))
    items = []
    for at in _some(np.arange(len(starts)), run.config.report.cards).tolist():
        mine = edges.slice(int(starts[at]), int(sizes[at]))
        best = ", ".join(f"{value:.2f}" for value in mine["similarity"].to_pylist()[:ANSWERS])
        text = f"cosine {best}" + (f" and {sizes[at] - ANSWERS:,} more" if sizes[at] > ANSWERS else "")
        items.append(Item([mine["a"][0].as_py(), *mine["b"].to_pylist()[:ANSWERS]], text))
    caption = "Left a seed, then the pictures of the pool that it asked for, the nearest first."
    return Listing("retrieval", "What seeds asked for", caption, items, len(starts))


def searched(run: Run, stage: str) -> tuple[Candidates, np.ndarray] | None:
    """Candidate pairs of "duplicates" or "holdout", each in its likest view, and their similarity."""
    path = run.stage(stage) / "candidates.parquet"
    if not path.exists():
        return None
    settings = run.config.duplicates if stage == "duplicates" else run.config.leaks
    found = Candidates.read(path)
    score = scores_of(run, stage, found, settings)
    order = np.lexsort((-score, found.pairs[:, 1], found.pairs[:, 0]))
    fresh = np.ones(len(order), bool)
    fresh[1:] = (np.diff(found.pairs[order], axis=0) != 0).any(axis=1)
    rows = order[fresh]
    likest = Candidates(found.pairs[rows], found.view[rows], found.cosine[rows], found.hamming[rows])
    return likest, score[rows]


def _seen(view: int) -> str:
    view %= OF_FIRST
    return " · mirrored or turned" if view in TURNS else " · a part of one" if view in TILES else ""


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items, evenly from first to last."""
    return [items[place] for place in _some(np.arange(len(items)), count).tolist()]


def short(uri: str, most: int = 34) -> str:
    """The end of a uri."""
    return uri if len(uri) <= most else "…" + uri[1 - most :]


def _spread(table: pa.Table, count: int) -> pa.Table:
    return table.take(pa.array(_some(np.arange(len(table)), count)))


def _some(rows: np.ndarray, count: int) -> np.ndarray:
    if len(rows) <= count:
        return rows
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]
