"""The page: counts, galleries that sample, charts, tables."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup, escape
from pyarrow import parquet

from curation.calibrate import threshold_of
from curation.ingest import Ingested
from curation.looks import THUMB
from curation.report import beside, calibration, listings
from curation.report.listings import Listing, spread
from curation.report.pictures import TILES, Pictures
from curation.run import Run
from curation.write import BEFORE
from dinov2.data.manifest import DECISIONS_SCHEMA, read_format
from dinov2.files import whole_folder
from dinov2.pages import Card, Page, histogram

SHOWN = 24  # items of a listing on the page
ROWS = 30  # lines in a table

NAMES = {
    "takedown": "taken out by hand",
    "ingest": "unreadable, too small, blank or extreme",
    "filters": "over a classifier's limit",
    "duplicates": "lost to a copy that stays",
    "holdout": "near a holdout picture",
    "retrieval": "asked for by no seed",
    "budget": "over the budget",
}


def run(run: Run) -> dict[str, Any]:
    """Write the page and those beside it; returns how many thumbnails those may show."""
    decisions = read_format(run.folder / "decisions.parquet", DECISIONS_SCHEMA)
    kept = int(pc.sum(decisions["kept"]).as_py())
    page = Page("Curation", subtitle=f"{kept:,} of {len(decisions):,} pictures of {run.config.pool} stay")
    gone = {stage: pc.sum(pc.equal(decisions["dropped_by"], stage)).as_py() or 0 for stage in BEFORE}
    page.flow(list(_flow(gone, len(decisions))))
    page.numbers(_numbers(run, gone, len(decisions), kept))
    with whole_folder(run.folder / beside.FOLDER) as folder:
        shown = Shown(page, Pictures(run), folder)
        for stage in ("duplicates", "holdout"):
            _pairs(shown, run, stage, decisions)
        shown.add(listings.components(run), most=SHOWN // 2)
        calibration.draw(page, run, shown.pictures)
        shown.add(listings.clusters(run))
        shown.add(listings.retrieved(run))
    _statistics(page, run, decisions)
    _unreadable(page, decisions)
    page.write(run.folder / "report.html")
    return {"pictures beside it": shown.beside}


class Shown:
    """Listings on the page, and beside it where they are longer."""

    def __init__(self, page: Page, pictures: Pictures, folder: Path) -> None:
        self.page, self.pictures, self.beside = page, pictures, 0
        self._folder = folder

    def add(self, listing: Listing | None, *, heading: bool = True, most: int = SHOWN) -> None:
        """With a heading of its own, or below the last one."""
        if listing is None or not listing.items:
            return
        if heading:
            self.page.heading(listing.title)
        items = listing.items[:most] if listing.ordered else spread(listing.items, most)
        caption = Markup(escape(listing.caption))
        if len(items) < len(listing.items):
            beside.write(listing, self.pictures, self._folder)
            self.beside += sum(len(item.names) for item in listing.items)
            caption += Markup(" ") + beside.link(listing) + Markup(".")
        cards = [
            Card(
                [self.pictures.mosaic(item.names)] if listing.mosaic else self._images(item.names),
                item.text,
                item.tone,
            )
            for item in items
        ]
        self.page.gallery(cards, caption, side=TILES * THUMB if listing.mosaic else 128)

    def _images(self, names: list[str]) -> list[Any]:
        return [image for name in names if (image := self.pictures.image(name)) is not None]


def _flow(gone: dict[str, int], total: int) -> Iterator[tuple[str, int, int, str]]:
    left = total
    for stage, count in gone.items():
        if stage in ("ingest", "duplicates") or count:
            yield stage, left, left - count, f"{count:,} {NAMES[stage]}" if count else "none dropped"
        left -= count


def _numbers(run: Run, gone: dict[str, int], total: int, kept: int) -> dict[str, str]:
    found = run.done("duplicates") or {}
    numbers = {"pictures": f"{total:,}", "kept": f"{kept:,}"}
    numbers |= {f"dropped by {stage}": f"{count:,}" for stage, count in gone.items() if count}
    if found.get("components"):
        numbers |= {"groups of copies": f"{found['components']:,}", "largest group": f"{found['largest']:,}"}
    return numbers


def _pairs(shown: Shown, run: Run, stage: str, decisions: pa.Table) -> None:
    """Who lost to whom; where the threshold lies among all pairs; the pairs on both sides of it."""
    shown.add(listings.dropped(run, stage, decisions, shown.pictures))
    if stage == "holdout":
        _leaks(shown.page, run)
    found = listings.searched(run, stage)
    if found is None or not len(found[1]):
        return
    candidates, score = found
    threshold = threshold_of(run, stage)
    shown.page.heading(
        f"The threshold for {'duplicates' if stage == 'duplicates' else 'leaks'}: {threshold:g}"
    )
    chart = histogram(
        {"candidates": score}, x="similarity", y="pairs", marks={"threshold": threshold}, log_y=True,
        title=f"{len(score):,} candidate pairs",
    )  # fmt: skip
    shown.page.figure(chart, f"Similarity of the candidate pairs; those from {threshold:g} on count.")
    for listing in listings.near_threshold(run, stage, candidates, score):
        shown.add(listing, heading=False, most=SHOWN // 2)


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
    chosen = best.take(pa.array(spread(range(len(best)), ROWS)))
    lines = [[row["holdout_uri"], row["pool_uri"], f"{row['similarity']:.2f}"] for row in chosen.to_pylist()]
    page.table(
        ["holdout picture", "leaked from", "similarity"], lines,
        caption=f"{len(lines)} of {len(leaks):,} pairs; all are in `leaks.parquet`",
    )  # fmt: skip


def _statistics(page: Page, run: Run, decisions: pa.Table) -> None:
    source = run.sets["pool"]
    ingested = Ingested(run, "pool").table
    kept = decisions["kept"].to_numpy()
    page.heading("Before and after")
    for column in ("source", "label", "licence", "consent"):
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
