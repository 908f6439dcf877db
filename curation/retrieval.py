"""Stage 5: the pictures nearest to each seed stay (DINOv2 app. A, sample-based retrieval)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from curation.embed import Embedded
from curation.near import Halves, Rows
from curation.run import Run

BEFORE = ["ingest", "duplicates", "holdout"]
SEARCHED = 8  # times k neighbours are searched, so that a seed that lost a collision can take a later one

Found = tuple[Rows, Rows, NDArray[np.float32]]


def run(run: Run) -> dict[str, Any]:
    """Keep what seeds ask for; without seeds, everything."""
    if "seeds" not in run.sets:
        run.drop("retrieval", {"id": []})
        return {"seeds": 0, "asked": 0, "dropped": 0}
    settings = run.config.retrieval
    pool, seeds = Embedded(run, "pool"), Embedded(run, "seeds")
    live = np.flatnonzero(run.kept(pool.ids, BEFORE))
    similarity, index = _search(seeds.vectors[:], pool.vectors[live], settings.k, settings.collisions)
    index[similarity < settings.minimum] = -1
    seed, place, how = COLLISIONS[settings.collisions](similarity, index, settings.k)
    rows = live[place]
    run.write_edges("retrieval", seeds.ids.take(seed), pool.ids.take(rows), how)
    lost = np.setdiff1d(live, rows)
    run.drop("retrieval", {"id": pool.ids.take(lost).to_pylist()})
    asked = len(np.unique(rows))
    return {"seeds": len(seeds.ids), "asked": len(rows), "shared": len(rows) - asked, "dropped": len(lost)}


def _search(seeds: Halves, pool: Halves, k: int, collisions: str) -> tuple[NDArray[np.float32], Rows]:
    # Imported here, so that what does not search starts without torch.
    from dinov2.neighbours import nearest

    similarity, index = nearest(seeds, pool, k * SEARCHED if collisions == "refill" else k)
    return similarity.numpy().round(4).astype(np.float32), index.numpy()


def _keep(similarity: NDArray[np.float32], index: Rows, k: int) -> Found:
    """Every seed has its k; a picture may serve several, and stands for all of them in the edges."""
    seed, rank = np.nonzero(index[:, :k] >= 0)
    return seed, index[seed, rank], similarity[seed, rank]


def _drop(similarity: NDArray[np.float32], index: Rows, k: int) -> Found:
    """A picture serves only the seed it is likest to; the others go short."""
    seed, place, how = _keep(similarity, index, k)
    order = np.lexsort((seed, -how, place))
    first = np.ones(len(order), bool)
    first[1:] = place[order][1:] != place[order][:-1]
    chosen = np.sort(order[first])
    return seed[chosen], place[chosen], how[chosen]


def _refill(similarity: NDArray[np.float32], index: Rows, k: int) -> Found:
    """As `drop`, but a seed gone short takes its next nearest: pairs are settled from the likest down."""
    seed, rank = np.nonzero(index >= 0)
    place, how = index[seed, rank], similarity[seed, rank]
    taken, served, chosen = set(), np.zeros(len(index), np.int64), []
    for pair in np.lexsort((seed, place, -how)).tolist():
        if served[seed[pair]] < k and place[pair] not in taken:
            taken.add(place[pair])
            served[seed[pair]] += 1
            chosen.append(pair)
    rows = np.sort(np.array(chosen, np.int64))
    return seed[rows], place[rows], how[rows]


COLLISIONS = {"keep": _keep, "drop": _drop, "refill": _refill}
