"""What a threshold means for the embedding in use, measured on synthetic copies of the pool's own pictures.

Some pictures of the pool are copied in the kinds of `dinov2.data.copies`. Each copy is looked for among
pictures of the pool as a duplicate would be, and what was found is counted for every threshold: copies found,
by kind, and the share of pairs that are a copy and its original. The latter is a precision if each
picture of the pool had one copy in it; pairs of different pictures are counted up to the pool's size.

A pool has copies of its own, which nobody has marked. So where two originals, as they are, can be laid over
each other beyond doubt (`SAME`), a pair of one's copy and the other counts neither way.

Thresholds that are left to this stage (null) are picked from those at which, and above which, the precision
is what `calibrate.precision` or `calibrate.leaks` asks for: the highest that finds as much as any of them.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from curation.config import CurateConfig
from curation.ingest import Stack
from curation.near import Pictures, Piece, Rows, align_piece, cosines, likest_views, nearest_of
from curation.planted import Copies, plant
from curation.run import Run
from curation.search import Job, Side, gathered, look_up, once, prepare, search_pieces, with_views
from curation.views import TURNS
from dinov2.data.copies import KINDS
from dinov2.exits import UserError
from dinov2.files import read_json, write_json, write_table

PAIRS = 2000  # that are laid over each other in one
SAME = 0.9  # score of the alignment from which two originals are taken for one picture
GRID = np.round(np.arange(0.2, 1.0, 0.01), 2)  # thresholds that are tried

SLACK = 0.005  # of the recall, that a higher threshold may cost

ALIGNED = {"duplicates": 0.75, "holdout": 0.65}  # of the alignment's score, whatever the embedding
SSCD = {"duplicates": 0.6, "holdout": 0.45}  # of the cosine of SSCD's embedding (DINOv2 app. A)
SECTIONS = {"duplicates": "duplicates", "holdout": "leaks"}  # settings of the two stages that decide by one

Share = NDArray[np.float64]


def run(run: Run) -> dict[str, Any]:
    """Copy, search, count; write `pairs.parquet`, `curve.parquet` and `picked.json`, if this is asked for."""
    settings, folder = run.config.calibrate, run.stage("calibrate")
    if not settings.pictures:
        return {"copies": 0}
    pool = Pictures(run, "pool")
    live = np.flatnonzero(run.kept(pool.ids, ["ingest", "filters"]))
    base = live[: settings.among]  # of the lowest ids, which are hashes: at random
    copies = plant(run, base[: settings.pictures], folder / "copies", "calibrate: copy")
    pairs = _pairs(run, pool, base, copies)
    write_table(folder / "pairs.parquet", pairs)
    curves = {
        measure: curve(pairs, measure, pictures=len(base[: settings.pictures]), scale=len(live) / len(base))
        for measure in measures(run.config).values()
    }
    write_table(folder / "curve.parquet", pa.concat_tables(curves.values()))
    floors = {"duplicates": settings.precision, "holdout": settings.leaks}
    found = {}
    for stage, measure in measures(run.config).items():
        near = getattr(run.config, SECTIONS[stage])
        if near.threshold is None:
            least = near.loosest if near.verify else near.cosine
            found[stage] = picked(curves[measure], floors[stage], least=least)
    write_json(folder / "picked.json", found)
    return {"copies": len(copies), "among": len(base), "pairs": len(pairs), **_named(found)}


def _named(found: dict[str, float]) -> dict[str, float]:
    return {f"{SECTIONS[stage]}.threshold": value for stage, value in found.items()}


def threshold_of(run: Run, stage: str) -> float:
    """From which similarity pairs count in "duplicates" or "holdout": as set, calibrated, or by default."""
    settings = getattr(run.config, SECTIONS[stage])
    if settings.threshold is not None:
        return settings.threshold
    path = run.stage("calibrate") / "picked.json"
    calibrated = read_json(path) if run.config.calibrate.pictures else {}
    return calibrated.get(stage, (ALIGNED if settings.verify else SSCD)[stage])


def measures(config: CurateConfig) -> dict[str, str]:
    """Which similarity decides in each of the two stages: "score" of the alignment, or "cosine"."""
    return {
        stage: "score" if getattr(config, section).verify else "cosine" for stage, section in SECTIONS.items()
    }


def borrowed(config: CurateConfig) -> str | None:
    """What is to be said where SSCD's thresholds are used with an embedding not named as SSCD's are."""
    if config.calibrate.pictures or "sscd" in Path(config.backbone).name.lower():
        return None
    used = [
        f"{section}.threshold={SSCD[stage]:g}"
        for stage, section in SECTIONS.items()
        if not getattr(config, section).verify
        and getattr(config, section).threshold in (None, SSCD[stage])
        and (stage != "holdout" or config.holdout is not None)
    ]
    if not used:
        return None
    return (
        f"{' and '.join(used)} {'belong' if len(used) > 1 else 'belongs'} to SSCD's embedding and say little "
        f"of the cosine of {config.backbone}: calibrate.pictures=200 measures what serves here"
    )


def picked(curve: pa.Table, floor: float, *, least: float) -> float:
    """Of the thresholds from `least` on at which, and above which, the precision is at least `floor`, one.

    It is the highest of them whose recall is within `SLACK` of the best.

    Raises:
        UserError: there is none.
    """
    threshold, precision, recall = (curve[name].to_numpy() for name in ("threshold", "precision", "recall"))
    below = np.flatnonzero((precision < floor) | (threshold < least))
    first = int(below[-1]) + 1 if len(below) else 0
    if first == len(threshold):
        raise UserError(
            f"calibrate: no threshold has a precision of {floor:g} on this pool (at most "
            f"{precision.max():.2f}); give duplicates.threshold= and leaks.threshold=, a lower "
            "calibrate.precision, or another backbone"
        )
    return float(threshold[np.flatnonzero(recall >= recall[first] - SLACK)[-1]])


def curve(pairs: pa.Table, measure: str, *, pictures: int, scale: float) -> pa.Table:
    """What each threshold of GRID finds, a row each.

    Columns: measure, threshold, precision, recall, unlike (pairs of different pictures, for each copy), and
    the recall of each kind.

    Args:
        pairs: as `pairs.parquet` holds them. pictures: that were copied, each once in every kind.
        scale: by how much the pool is larger than the part of it that copies were looked for in.
    """
    similarity = pairs[measure].to_numpy().astype(np.float64).round(4)
    right, unlike = pairs["right"].to_numpy(), pairs["unlike"].to_numpy()
    kind = pairs["kind"].to_numpy()
    by_kind = {
        name: _above(similarity[right & (kind == place)]) / pictures for place, name in enumerate(KINDS)
    }
    found, wrong = _above(similarity[right]), _above(similarity[unlike]) * scale
    return pa.table(
        {
            "measure": [measure] * len(GRID),
            "threshold": GRID,
            "precision": np.where(found + wrong > 0, found / np.maximum(found + wrong, 1e-9), 1.0),
            "recall": found / (pictures * len(KINDS)),
            "unlike": wrong / (pictures * len(KINDS)),
            **by_kind,
        }
    )


def _above(similarity: Share) -> Share:
    """[thresholds] how many are at least so much."""
    return (len(similarity) - np.searchsorted(np.sort(similarity), GRID)).astype(np.float64)


def _pairs(run: Run, pool: Pictures, base: Rows, copies: Copies) -> pa.Table:
    """Every pair of a copy and a picture that the search for duplicates would look at.

    Columns: copy, kind, row (of the copied picture), other (row of the picture found), right (they are the
    same), unlike (they are different pictures, as far as can be said), cosine, score (of the alignment, if it
    decides).
    """
    folder, near = run.stage("calibrate"), run.config.duplicates
    queries = Side(
        lambda: copies.vectors, copies.hashes, copies.thumbs, copies.turned, np.arange(len(copies))
    )
    jobs = with_views(Job(queries, pool.side(base), folder / "index", inside=False), TURNS, near)
    done = folder / "candidates.parquet"
    if not done.exists():
        prepare(jobs, run.config.search)
        blocks = list(range(sum(len(job.blocks()) for job in jobs)))
        what = "calibrate: search"
        by_hash = look_up(jobs, blocks, near, run.workers, what)
        search_pieces(jobs, blocks, by_hash, folder / "search", near, run.config.search, what)
        found = np.concatenate(
            list(gathered(folder / "search", len(copies), run.config.search.memory_gib / 4))
        )
        write_table(done, pa.table(dict(zip(("copy", "other", "view"), found.T.copy(), strict=True))))
    table = parquet.read_table(done)
    pairs, view = (
        np.stack([table["copy"].to_numpy(), table["other"].to_numpy()], axis=1),
        table["view"].to_numpy(),
    )
    cosine = cosines(copies.vectors, pool.vectors, pairs)
    score = np.zeros(len(pairs), np.float32)
    if "score" in measures(run.config).values():
        again = nearest_of(pairs, view, cosine, near.tilted, near.tilts)
        score = _scores(run, "aligned", pairs, view, again, copies.thumbs, pool)
    met = np.stack([copies.row[pairs[:, 0]], pairs[:, 1], view], axis=1)
    _, cosine = likest_views(pairs, cosine)  # the same in every view
    pairs, score = likest_views(pairs, score)
    originals = np.stack([copies.row[pairs[:, 0]], pairs[:, 1]], axis=1)
    right = originals[:, 0] == originals[:, 1]
    columns = {
        "copy": pairs[:, 0].copy(),
        "kind": copies.kind[pairs[:, 0]],
        "row": originals[:, 0].copy(),
        "other": pairs[:, 1].copy(),
        "right": right,
        "cosine": cosine,
    }
    if "score" in measures(run.config).values():
        columns["score"] = score
    one = _one_picture(run, met[met[:, 0] != met[:, 1]], pool)
    unlike = ~right & ~np.isin(_numbers(originals, len(pool)), _numbers(one, len(pool)))
    return pa.table({**columns, "unlike": unlike})


def _one_picture(run: Run, met: Rows, pool: Pictures) -> Rows:
    """[q, 2] originals that are taken for one picture, as they are or in a view in which their copies met."""
    originals = once(np.concatenate([met, met * [1, 1, 0]]))
    pairs, view = originals[:, :2], originals[:, 2]
    score = _scores(run, "originals", pairs, view, np.zeros(len(view), bool), pool.thumbs, pool)
    return pairs[score >= SAME]


def _numbers(pairs: Rows, count: int) -> Rows:
    """A number for each pair of `count` rows, the same in either order."""
    return pairs.min(axis=1) * count + pairs.max(axis=1)


def _scores(
    run: Run, name: str, pairs: Rows, view: Rows, again: NDArray[np.bool_], first: Stack, second: Pictures
) -> NDArray[np.float32]:
    """Scores of the alignment of pairs, in pieces that are done or not done."""
    tall, unknown = second.tall[pairs[:, 1]], np.full(len(pairs), np.nan, np.float32)
    folder = run.stage("calibrate") / name
    spans = [slice(at, at + PAIRS) for at in range(0, len(pairs), PAIRS)]
    pieces = [
        Piece(
            folder / f"{number:05d}.parquet",
            pairs[span],
            view[span],
            again[span],
            unknown[span],
            first,
            second.thumbs,
            tall[span],
        )
        for number, span in enumerate(spans)
    ]
    left = [piece for piece in pieces if not piece.path.exists()]
    run.workers.do(align_piece, left, what=f"calibrate: {name}", total=len(pairs), unit="pair")
    parts = [parquet.read_table(piece.path)["score"].to_numpy() for piece in pieces]
    return np.concatenate([np.zeros(0, np.float32), *parts])
