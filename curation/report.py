"""Stage 8: `report.html`, what was chosen and why, for a person to look at and disagree with."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from curation.calibrate import threshold_of
from curation.ingest import Ingested
from curation.near import Candidates, scores_of
from curation.run import Run
from curation.write import BEFORE
from dinov2.data.decode import Unreadable, decode
from dinov2.data.manifest import CLUSTERS_SCHEMA, DECISIONS_SCHEMA, EDGES_SCHEMA, read_format
from dinov2.pages import Card, Page, histogram

Tone = Literal["good", "bad", "plain"]

SHOWN = 24  # pairs in a gallery
ROWS = 30  # lines in a table

NAMES = {
    "takedown": "taken out by hand",
    "ingest": "unreadable, too small, blank or extreme",
    "duplicates": "copies of a picture that stays",
    "holdout": "near a holdout picture",
    "retrieval": "asked for by no seed",
    "budget": "over the budget",
}


def run(run: Run) -> dict[str, Any]:
    """Write the page; returns nothing to count."""
    decisions = read_format(run.folder / "decisions.parquet", DECISIONS_SCHEMA)
    pictures = Pictures(run)
    kept = int(pc.sum(decisions["kept"]).as_py())
    page = Page("Curation", subtitle=f"{kept:,} of {len(decisions):,} pictures of {run.config.pool} stay")
    page.flow(list(_flow(run, len(decisions))))
    page.numbers(_numbers(run, len(decisions), kept))
    _dropped_pairs(page, run, decisions, pictures)
    for stage, kind in (("duplicates", "duplicates"), ("holdout", "leaks")):
        if (run.stage(stage) / "candidates.parquet").exists():
            _threshold(page, run, stage, kind, threshold_of(run, stage), pictures)
    _components(page, run, decisions, pictures)
    _clusters(page, run, pictures)
    _retrieved(page, run, pictures)
    _statistics(page, run, decisions)
    _unreadable(page, decisions)
    page.write(run.folder / "report.html")
    return {}


class Pictures:
    """Pictures of any set by id, decoded small, for the galleries."""

    def __init__(self, run: Run):
        self.sets = run.sets
        self.place = {
            name: (role, row)
            for role, source in reversed(run.sets.items())
            for row, name in enumerate(source.ids)
        }

    def image(self, name: str) -> Any:
        role, row = self.place[name]
        try:
            return decode(self.sets[role].read(row), at_least=256)
        except Unreadable:  # it went away after ingest; the report goes without it
            return None

    def uri(self, name: str) -> str:
        role, row = self.place[name]
        return self.sets[role].table["uri"][row].as_py()

    def card(self, names: list[str], text: str, tone: Tone) -> Card:
        found = [image for name in names if (image := self.image(name)) is not None]
        return Card(pictures=found, text=text, tone=tone)


def _flow(run: Run, total: int) -> Iterator[tuple[str, int, int, str]]:
    left = total
    for stage in BEFORE:
        gone = len(run.dropped(stage))
        if stage in ("ingest", "duplicates") or gone:
            yield stage, left, left - gone, f"{gone:,} {NAMES[stage]}" if gone else "none dropped"
        left -= gone


def _numbers(run: Run, total: int, kept: int) -> dict[str, str]:
    found = run.done("duplicates") or {}
    numbers = {"pictures": f"{total:,}", "kept": f"{kept:,}"}
    numbers |= {
        f"dropped by {stage}": f"{len(run.dropped(stage)):,}" for stage in BEFORE if len(run.dropped(stage))
    }
    if found.get("components"):
        numbers |= {"groups of copies": f"{found['components']:,}", "largest group": f"{found['largest']:,}"}
    return numbers


def _dropped_pairs(page: Page, run: Run, decisions: pa.Table, pictures: Pictures) -> None:
    for stage in ("duplicates", "holdout"):
        rows = decisions.filter(pc.equal(decisions["dropped_by"], stage)).to_pylist()
        if not rows:
            continue
        page.heading("Copies and what they lost to" if stage == "duplicates" else "Holdout leaks")
        cards = []
        for row in _spread(sorted(rows, key=lambda row: (-row["similarity"], row["id"])), SHOWN):
            text = f"{row['similarity']:.2f} · {row['uri']} lost to {pictures.uri(row['evidence'])}"
            cards.append(pictures.card([row["id"], row["evidence"]], text, "bad"))
        page.gallery(
            cards,
            f"{len(cards)} of {len(rows):,}: left dropped, right why; from the likest to the least alike",
        )
        if stage == "holdout":
            _leaks(page, run)


def _leaks(page: Page, run: Run) -> None:
    """Which evaluation pictures are in the pool, and where those come from."""
    path = run.folder / "leaks.parquet"
    if not path.exists() or not len(leaks := parquet.read_table(path)):
        return
    keys = ["holdout_source", "pool_source"]
    counts = leaks.group_by(keys).aggregate([("holdout_id", "count_distinct"), ("pool_id", "count_distinct")])
    rows = [list(row.values()) for row in counts.sort_by([(key, "ascending") for key in keys]).to_pylist()]
    page.table(["holdout", "leaked from", "its pictures", "pictures of the pool"], rows[:ROWS])
    best = leaks.sort_by([("similarity", "descending"), ("holdout_uri", "ascending")])
    listed = _spread(best.to_pylist(), ROWS)
    lines = [[row["holdout_uri"], row["pool_uri"], f"{row['similarity']:.2f}"] for row in listed]
    page.table(
        ["holdout picture", "leaked from", "similarity"], lines,
        caption=f"{len(lines)} of {len(leaks):,} pairs; all are in `leaks.parquet`",
    )  # fmt: skip


def _clusters(page: Page, run: Run, pictures: Pictures) -> None:
    """Mosaics of the finest level's clusters: the pictures nearest to the centroid."""
    path = run.folder / "clusters.parquet"
    if not path.exists():
        return
    table = read_format(path, CLUSTERS_SCHEMA)
    levels = [name for name in table.column_names if name.startswith("level_")]
    sizes = Counter(table["level_0"].to_pylist())
    cards = []
    for cluster, size in _spread(sizes.most_common(), SHOWN // 2):
        mine = table.filter(pc.equal(table["level_0"], cluster)).sort_by([("distance", "ascending")])
        cards.append(pictures.card(mine["id"].to_pylist()[:6], f"{size:,} pictures", "plain"))
    page.heading("Clusters")
    counts = ", ".join(f"{len(pc.unique(table[name])):,}" for name in levels)
    page.gallery(
        cards,
        f"{len(cards)} of {len(sizes):,} clusters, from the largest to the smallest, by the pictures nearest "
        f"to the centroid. Clusters on each level: {counts}.",
    )


def _threshold(page: Page, run: Run, stage: str, title: str, threshold: float, pictures: Pictures) -> None:
    candidates = Candidates.read(run.stage(stage) / "candidates.parquet")
    score = scores_of(
        run, stage, candidates, run.config.duplicates if stage == "duplicates" else run.config.leaks
    )
    if not len(score):
        return
    page.heading(f"The threshold for {title}: {threshold:g}")
    first = Ingested(run, "pool").readable()["id"]
    second = first if stage == "duplicates" else Ingested(run, "holdout").readable()["id"]
    chart = histogram(
        {"candidates": score}, x="similarity", y="pairs", marks={"threshold": threshold}, log_y=True,
        title=f"{len(score):,} candidate pairs",
    )  # fmt: skip
    page.figure(chart, f"Similarity of the candidate pairs; those from {threshold:g} on count.")
    for side, chosen in (("above", score >= threshold), ("below", score < threshold)):
        rows = np.flatnonzero(chosen)
        rows = rows[np.argsort(np.abs(score[rows] - threshold), kind="stable")][: SHOWN // 2]
        cards = []
        for row in rows:
            names = [
                first[int(candidates.pairs[row, 0])].as_py(),
                second[int(candidates.pairs[row, 1])].as_py(),
            ]
            cosine, bits = candidates.cosine[row], candidates.hamming[row]
            text = f"{score[row]:.3f} · cosine {cosine:.2f} · hashes {bits} bits apart"
            cards.append(pictures.card(names, text, "bad" if side == "above" else "good"))
        if cards:
            page.gallery(cards, f"The pairs nearest to the threshold, {side} it")


def _components(page: Page, run: Run, decisions: pa.Table, pictures: Pictures) -> None:
    path = run.stage("duplicates") / "components.parquet"
    if not path.exists():
        return
    table = parquet.read_table(path)
    largest = Counter(table["component"].to_pylist()).most_common(6)
    if not largest or largest[0][1] < 3:
        return
    page.heading("The largest groups of copies")
    cards = []
    for component, size in largest:
        members = table.filter(pc.equal(table["component"], component)).sort_by([("kept", "descending")])
        least = pc.min(members["similarity"]).as_py()
        names = members["id"].to_pylist()[:8]
        cards.append(
            pictures.card(names, f"{size} pictures, least likeness to the one kept {least:.2f}", "plain")
        )
    page.gallery(
        cards, "First the picture that stays. A chain of near pictures shows as a low least likeness."
    )


def _retrieved(page: Page, run: Run, pictures: Pictures) -> None:
    path = run.folder / "edges" / "retrieval.parquet"
    if not path.exists():
        return
    edges = read_format(path, EDGES_SCHEMA)
    seeds = _spread(sorted(set(edges["a"].to_pylist())), SHOWN // 2)
    cards = []
    for seed in seeds:
        mine = edges.filter(pc.equal(edges["a"], seed)).sort_by([("similarity", "descending")])
        best = [f"{value:.2f}" for value in mine["similarity"].to_pylist()[:4]]
        cards.append(pictures.card([seed, *mine["b"].to_pylist()[:4]], "cosine " + ", ".join(best), "plain"))
    page.heading("What seeds asked for")
    page.gallery(cards, "Left a seed, then the pool pictures nearest to it")


def _statistics(page: Page, run: Run, decisions: pa.Table) -> None:
    source = run.sets["pool"]
    ingested = Ingested(run, "pool").table
    kept = decisions["kept"].to_numpy()
    page.heading("Before and after")
    for column in ("source", "label"):
        values = np.array(source.table[column].to_pylist(), dtype=object)
        before, after = Counter(values.tolist()), Counter(values[kept].tolist())
        if len(before) > 1 or column == "source":
            rows = [
                [name or "none", f"{count:,}", f"{after[name]:,}"] for name, count in before.most_common(ROWS)
            ]
            more = f" ({ROWS} of {len(before):,})" if len(before) > ROWS else ""
            page.table([column, "before", "after"], rows, caption=f"Pictures by {column}{more}")
    side = np.minimum(
        *(ingested[name].to_numpy(zero_copy_only=False).astype(float) for name in ("width", "height"))
    )
    readable = np.isfinite(side)
    sides = {"before": side[readable], "after": side[kept & readable]}
    page.figure(
        histogram(sides, x="short side, pixels", y="pictures", title="Sizes"), "Short side before and after."
    )


def _unreadable(page: Page, decisions: pa.Table) -> None:
    bad = decisions.filter(pc.is_valid(decisions["error"]))
    if len(bad):
        page.heading("Not usable")
        rows = [[row["uri"], row["error"]] for row in bad.slice(0, ROWS).to_pylist()]
        more = f"{min(ROWS, len(bad))} of {len(bad):,}; the others are in decisions.parquet"
        page.table(["picture", "why"], rows, caption=more)


def _spread(items: list[Any], count: int) -> list[Any]:
    """At most `count` items, evenly from first to last."""
    if len(items) <= count:
        return items
    return [items[round(place)] for place in np.linspace(0, len(items) - 1, count)]
