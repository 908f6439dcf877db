"""Stage 4: pool pictures near a holdout picture go, and with them their whole component of duplicates.

DINOv2 (app. A): relative deduplication against the evaluation sets' train and test images, with a looser
threshold than inside the pool. Equal bytes or pixels are a leak whatever the threshold. A copy that was
dropped as a duplicate still speaks for its component.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import parquet

from curation.calibrate import threshold_of
from curation.near import Pictures, Rows, near_pairs
from curation.run import Run
from dinov2.files import write_table


def run(run: Run) -> dict[str, Any]:
    """Find leaks of the holdout into the pool; write edges and what is dropped."""
    if "holdout" not in run.sets:
        run.drop("holdout", {"id": []})
        return {"holdout": 0, "pairs": 0, "leaked": 0, "dropped": 0}
    pool, held = Pictures(run, "pool"), Pictures(run, "holdout")
    settings = run.config.leaks
    live = np.flatnonzero(run.kept(pool.ids, ["ingest", "filters"]))
    exact = _exact_leaks(pool, held, live)
    near, similarity = near_pairs(run, "holdout", pool, live, held, settings)
    threshold = threshold_of(run, "holdout")
    stored = similarity >= min(settings.loosest, threshold)
    near, similarity = near[stored], similarity[stored]
    # What is equal counts whatever the threshold.
    counted = np.concatenate([np.ones(len(exact), bool), similarity >= threshold])
    similarity = np.concatenate([np.ones(len(exact), np.float32), similarity])
    pairs, similarity, counted = _once(np.concatenate([exact, near]), similarity, counted)
    run.write_edges("holdout", pool.ids.take(pairs[:, 0]), held.ids.take(pairs[:, 1]), similarity)

    _write_leaks(
        run,
        pool.ids.take(pa.array(pairs[counted, 0])),
        held.ids.take(pa.array(pairs[counted, 1])),
        similarity[counted],
    )
    lost, evidence, how = _components_lost(run, pool, pairs[counted], similarity[counted])
    kept = run.kept(pool.ids, ["ingest", "filters", "duplicates"])[lost]
    lost, evidence, how = lost[kept], evidence[kept], how[kept]
    run.drop(
        "holdout",
        {
            "id": pool.ids.take(lost).to_pylist(),
            "evidence": held.ids.take(evidence).to_pylist(),
            "similarity": how.tolist(),
        },
    )
    leaked = len(np.unique(pairs[counted, 1]))
    return {"holdout": len(held), "pairs": int(counted.sum()), "leaked": leaked, "dropped": len(lost)}


def _write_leaks(run: Run, pool: pa.Array, held: pa.Array, similarity: np.ndarray) -> None:
    """`leaks.parquet`: which holdout picture is in the pool, where from, as which picture, how alike."""
    columns: dict[str, pa.Array] = {}
    for role, ids in (("holdout", held), ("pool", pool)):
        table = run.sets[role].table
        rows = pc.index_in(ids, value_set=table["id"].combine_chunks())
        columns[f"{role}_id"] = ids
        for name in ("uri", "source", "split"):
            columns[f"{role}_{name}"] = table[name].take(rows).cast(pa.large_string())
    leaks = pa.table({**columns, "similarity": similarity})
    order = [("holdout_source", "ascending"), ("holdout_uri", "ascending"), ("similarity", "descending")]
    write_table(run.folder / "leaks.parquet", leaks.sort_by([*order, ("pool_id", "ascending")]))


def _components_lost(
    run: Run, pool: Pictures, pairs: Rows, similarity: np.ndarray
) -> tuple[Rows, Rows, np.ndarray]:
    """Every pool picture whose component touches the holdout; the likest holdout picture of the component."""
    component = _components(run, pool)
    order = np.lexsort((pairs[:, 1], similarity))  # the likest last, so that it is the one that stays written
    evidence = np.full(int(component.max(initial=-1)) + 1, -1, np.int64)
    how = np.zeros(len(evidence), np.float32)
    touched = component[pairs[order, 0]]
    evidence[touched], how[touched] = pairs[order, 1], similarity[order]
    lost = np.flatnonzero(evidence[component] >= 0)
    return lost, evidence[component[lost]], how[component[lost]]


def _components(run: Run, pool: Pictures) -> Rows:
    """[n] the component of duplicates of each picture, a number of its own for one without company."""
    component = np.arange(len(pool), dtype=np.int64)
    path = run.stage("duplicates") / "components.parquet"
    if path.exists():
        table = parquet.read_table(path)
        rows = pc.index_in(table["id"], value_set=pool.ids).to_numpy()
        component[rows] = table["component"].to_numpy() + len(pool)
    return np.unique(component, return_inverse=True)[1]


def _exact_leaks(pool: Pictures, held: Pictures, live: Rows) -> Rows:
    found = [np.zeros((0, 2), np.int64)]
    for column in ("sha256", "pixel_sha256"):
        theirs = held.table[column].combine_chunks()
        place = pc.index_in(pool.table[column].combine_chunks(), value_set=theirs)
        rows = live[place.is_valid().to_numpy(zero_copy_only=False)[live]]
        found.append(np.stack([rows, place.take(rows).to_numpy().astype(np.int64)], axis=1))
    return np.concatenate(found)


def _once(
    pairs: Rows, similarity: np.ndarray, counted: NDArray[np.bool_]
) -> tuple[Rows, np.ndarray, NDArray[np.bool_]]:
    """Each pair once: as it counts, if it does, with its largest similarity."""
    order = np.lexsort((-similarity, ~counted, pairs[:, 1], pairs[:, 0]))
    pairs, similarity, counted = pairs[order], similarity[order], counted[order]
    first = np.ones(len(pairs), bool)
    first[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
    return pairs[first], similarity[first], counted[first]
