"""Stage 7: the mix. At most so many pictures stay, shared out over parts, each sampled evenly.

Three parts (Siméoni et al. 2025, arXiv 2508.10104, sec. 3.1: their mix beats each alone): what was named
`as_is` stays whole; the rest of the budget goes by weight to what seeds retrieved and to a balanced sample of
the pool's clusters. Without a weight for the latter, what no seed asked for has gone before.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from curation import clusters
from curation.ingest import Ingested
from curation.near import Rows
from curation.retrieval import asked_for
from curation.run import Run
from dinov2.exits import UserError

BEFORE = ["ingest", "filters", "duplicates", "holdout", "retrieval"]


def run(run: Run) -> dict[str, Any]:
    """Draw the budget from what is left."""
    settings = run.config.budget
    ids = Ingested(run, "pool").readable()["id"].combine_chunks()
    live = np.flatnonzero(run.kept(ids, BEFORE))
    if settings.pictures is None or settings.pictures >= len(live):
        run.drop("budget", {"id": []})
        return {"budget": settings.pictures, "dropped": 0}
    parts = _parts(run, ids, live)
    left = settings.pictures - len(parts["as_is"])
    if left < 0:
        raise UserError(
            f"budget.pictures={settings.pictures}: the pictures of as_is={run.config.as_is} are "
            f"{len(parts['as_is'])} alone; give more, or name fewer"
        )
    drawn = [name for name in ("retrieved", "clustered") if len(parts[name])]
    weights = [getattr(settings, name) for name in drawn]
    sizes = portions(np.array([len(parts[name]) for name in drawn]), np.array(weights, float), left)
    generator = np.random.default_rng([run.config.seed, 1])
    chosen = {"as_is": parts["as_is"]}
    for name, size in zip(drawn, sizes.tolist(), strict=True):
        chosen[name] = _drawn(run, ids, parts[name], size, generator)
    lost = np.setdiff1d(live, np.concatenate(list(chosen.values())))
    run.drop("budget", {"id": ids.take(pa.array(lost)).to_pylist()})
    counts = {name: len(rows) for name, rows in chosen.items() if len(rows)}
    return {"budget": settings.pictures, **counts, "dropped": len(lost)}


def portions(sizes: NDArray[np.int64], weights: NDArray[np.float64], budget: int) -> NDArray[np.int64]:
    """[parts] how much of each part: by weight; what a part is short of goes to the others by theirs.

    Sums to min(budget, sum of the sizes of parts with a weight).
    """
    taken = np.zeros(len(sizes), np.int64)
    open_ = weights > 0
    while open_.any():
        left = budget - int(taken[~open_].sum())
        share = left * weights * open_ / weights[open_].sum()
        full = open_ & (sizes <= share)
        if not full.any():
            taken[open_] = np.floor(share[open_]).astype(np.int64)
            first = np.flatnonzero(open_)[np.argsort(-(share - taken)[open_], kind="stable")]
            taken[first[: left - int(taken[open_].sum())]] += 1
            break
        taken[full] = sizes[full]
        open_ &= ~full
    return taken


def _parts(run: Run, ids: pa.Array, live: Rows) -> dict[str, Rows]:
    """Rows of the three parts, which have none in common."""
    as_is = live[run.as_is(ids)[live]]
    rest = np.setdiff1d(live, as_is)
    asked = asked_for(run)
    if asked is None:
        retrieved = rest if run.config.budget.clustered == 0 else rest[:0]
    else:
        retrieved = rest[pc.is_in(ids.take(pa.array(rest)), value_set=asked).to_numpy(zero_copy_only=False)]
    return {"as_is": as_is, "retrieved": retrieved, "clustered": np.setdiff1d(rest, retrieved)}


def _drawn(run: Run, ids: pa.Array, rows: Rows, size: int, generator: np.random.Generator) -> Rows:
    if run.config.budget.sampling == "uniform":
        return np.sort(generator.permutation(rows)[:size])
    # Imported here, so that what does not sample starts without torch.
    from curation.hierarchy import sampled

    if not (run.folder / clusters.FILE).exists():
        clusters.make(run)
    clustered, levels = clusters.levels_of(run)
    place = pc.index_in(ids.take(pa.array(rows)), value_set=clustered).to_numpy()
    return rows[sampled([level[place] for level in levels], size, generator)]
