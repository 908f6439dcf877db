"""What thresholds find of synthetic copies: charts, a table by kind, and one copy of each kind to look at."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from pyarrow import parquet

from curation.calibrate import SECTIONS, measures, threshold_of
from curation.ingest import Ingested, Stack
from curation.report.pictures import Pictures
from curation.run import Run
from dinov2.data.copies import KINDS
from dinov2.pages import Card, Page, curve, histogram

SHOWN = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # thresholds in the table
WORDS = {"score": "the alignment's score", "cosine": "the cosine of embeddings"}


def draw(page: Page, run: Run, pictures: Pictures) -> None:
    """If copies were made."""
    folder = run.stage("calibrate")
    if not run.config.calibrate.pictures or not (folder / "curve.parquet").exists():
        return
    page.heading("What thresholds find of synthetic copies")
    pairs, curves = (parquet.read_table(folder / f"{name}.parquet") for name in ("pairs", "curve"))
    for measure in dict.fromkeys(measures(run.config).values()):
        mine = curves.filter(pc.equal(curves["measure"], measure))
        marks = {
            f"{SECTIONS[stage]}.threshold": threshold_of(run, stage)
            for stage, used in measures(run.config).items()
            if used == measure and (stage != "holdout" or "holdout" in run.sets)
        }
        _curves(page, mine, measure, marks)
        _similarities(page, pairs, measure, marks)
        _by_kind(page, mine, marks)
    _examples(page, run, pairs, pictures)


def _curves(page: Page, curves: pa.Table, measure: str, marks: dict[str, float]) -> None:
    lines = {
        name: (curves["threshold"].to_numpy(), 100 * curves[name].to_numpy())
        for name in ("precision", "recall")
    }
    chart = curve(
        lines, x=WORDS[measure], y="percent", title="Precision and recall by threshold", marks=marks
    )
    page.figure(
        chart,
        "Recall: of all copies, those found. Precision: of the pairs found, those of a copy and its "
        "original, if each picture of the pool had one copy in it.",
    )


def _similarities(page: Page, pairs: pa.Table, measure: str, marks: dict[str, float]) -> None:
    values = {
        name: pairs.filter(pairs[column])[measure].to_numpy()
        for name, column in (("a copy and its original", "right"), ("different pictures", "unlike"))
    }
    chart = histogram(
        values, x=WORDS[measure], y="pairs", marks=marks, log_y=True, title="Similarity of pairs"
    )
    page.figure(chart, f"{len(pairs):,} pairs of a copy and a picture of the pool that is near it.")


def _by_kind(page: Page, curves: pa.Table, marks: dict[str, float]) -> None:
    chosen = sorted({*SHOWN, *(round(value, 2) for value in marks.values())})
    threshold = curves["threshold"].to_numpy()
    at = [int(np.abs(threshold - value).argmin()) for value in chosen]
    rows = [
        [name, *(f"{100 * curves[name][place].as_py():.0f}%" for place in at)]
        for name in (*KINDS, "recall", "precision")
    ]
    page.table(
        ["found of", *(f"{value:g}" for value in chosen)], rows, "By kind of copy, for some thresholds"
    )


def _examples(page: Page, run: Run, pairs: pa.Table, pictures: Pictures) -> None:
    """The first picture that was copied and is still to be seen, and each copy of it."""
    parts = sorted((run.stage("calibrate") / "copies").glob("*.parquet"))
    made = pa.concat_tables([parquet.read_table(part) for part in parts])
    thumbs = Stack([part.with_suffix(".thumbs.npy") for part in parts])
    deciding = measures(run.config)["duplicates"]
    names = Ingested(run, "pool").readable()["id"]
    rows = made["row"].to_numpy()
    first = next((row for row in dict.fromkeys(rows.tolist()) if not pictures.gone(names[row].as_py())), None)
    cards = []
    for place in np.flatnonzero(rows == first).tolist() if first is not None else []:
        hit = pairs.filter(pc.and_(pc.equal(pairs["copy"], place), pairs["right"]))
        how = f"{hit[deciding][0].as_py():.2f}" if len(hit) else "not met"
        copy = Image.fromarray(thumbs.rows(np.array([place]))[0])
        original = pictures.thumb(names[first].as_py())
        cards.append(Card([original, copy], f"{list(KINDS)[made['kind'][place].as_py()]}: {how}"))
    if not cards:
        return
    page.gallery(
        cards,
        "One picture and its copies, as a square of 64 pixels shows them, with their similarity.",
        side=96,
    )
