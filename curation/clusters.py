"""Stage 5: hierarchical k-means of what copies and leaks have left, for balanced sampling and for the report.

It runs where `clusters.levels` asks for it; else the budget's stage makes one level when it draws evenly.
"""

import math
from typing import Any

import numpy as np
import pyarrow as pa

from curation.embed import Embedded
from curation.near import Rows
from curation.run import Run
from dinov2.data.manifest import CLUSTERS_SCHEMA, clusters_schema, read_format, write_format

BEFORE = ["ingest", "filters", "duplicates", "holdout"]
FILE = "clusters.parquet"


def run(run: Run) -> dict[str, Any]:
    """Write `clusters.parquet`, if levels are named."""
    if not run.config.clusters.levels:
        return {"levels": 0}
    return make(run)


def make(run: Run) -> dict[str, Any]:
    """Cluster, and write `clusters.parquet`."""
    # Imported here, so that what does not cluster starts without torch.
    from curation.hierarchy import hierarchical
    from dinov2.neighbours.rows import Selected
    from dinov2.parallel import pick_device

    settings, pool = run.config.clusters, Embedded(run, "pool")
    live = np.flatnonzero(run.kept(pool.ids, BEFORE))
    counts = settings.levels or [max(1, math.isqrt(len(live)))]
    found = hierarchical(
        Selected(pool.vectors, live),
        counts,
        seed=run.config.seed,
        resamplings=settings.resamplings,
        nearest=settings.nearest,
        rounds=settings.rounds,
        memory_gib=settings.memory_gib,
        device=pick_device(settings.device),
    )
    columns = {f"level_{level}": cluster for level, cluster in enumerate(found.levels)}
    table = pa.table({"id": pool.ids.take(pa.array(live)), **columns, "distance": found.distance})
    write_format(run.folder / FILE, table, clusters_schema(len(columns)))
    return {
        "levels": len(columns),
        "pictures": len(live),
        **{name: len(np.unique(cluster)) for name, cluster in columns.items()},
    }


def levels_of(run: Run) -> tuple[pa.Array, list[Rows]]:
    """Ids of the clustered pictures, and their clusters on each level, the finest first."""
    table = read_format(run.folder / FILE, CLUSTERS_SCHEMA)
    names = [name for name in table.column_names if name.startswith("level_")]
    return table["id"].combine_chunks(), [table[name].to_numpy() for name in names]
