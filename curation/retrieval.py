"""Stage 6: of the pool, what seeds ask for stays (DINOv2 app. A). Each set of seeds asks in its own way.

Sample-based: the k pool pictures nearest to each seed. Cluster-based: the pool is clustered (flat k-means),
and from every cluster that holds more than n of the set's seeds so many pictures are taken at random. A set
is a source of `seeds=`; several are joined by commas, and called by name where they are written NAME=….
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import compute as pc

from curation.config import RetrievalConfig, SetConfig
from curation.embed import Embedded
from curation.near import Halves, Rows
from curation.run import Run
from dinov2.config import one_of
from dinov2.data.manifest import EDGES_SCHEMA, read_format
from dinov2.exits import UserError

BEFORE = ["ingest", "filters", "duplicates", "holdout"]
SEARCHED = 8  # times k neighbours are searched, so that a seed that lost a collision can take a later one
CHANGE = "give less, more seeds, or retrieval.mode=samples; settings can be changed with from_stage=retrieval"

Found = tuple[Rows, Rows, NDArray[np.float32]]  # pairs of a seed and a picture, with their similarity


@dataclass(frozen=True)
class Pool:
    """The live pictures of the pool and, where a set asks by clusters, their clusters."""

    vectors: Halves
    seed: int
    cluster: Rows
    centroids: NDArray[np.float32]


def run(run: Run) -> dict[str, Any]:
    """Keep what seeds ask for, and what is to stay as it is; without seeds, everything."""
    if "seeds" not in run.sets:
        run.drop("retrieval", {"id": []})
        return {"seeds": 0, "asked": 0, "dropped": 0}
    settings = run.config.retrieval
    embedded, seeds = Embedded(run, "pool"), Embedded(run, "seeds")
    live = np.flatnonzero(run.kept(embedded.ids, BEFORE))
    of_set = _sets(run, seeds.ids)
    for name in settings.sets:
        one_of(name, set(of_set), "retrieval.sets")
    pool = _pool(embedded.vectors[live], settings, of_set, run.config.seed)
    counts, found = {}, []
    for name, rows in of_set.items():
        seed, place, how = ask(pool, seeds.vectors[rows], settings.of(name, len(rows)))
        found.append((rows[seed], live[place], how))
        counts[name] = len(np.unique(place))
    seed, rows, how = (np.concatenate(parts) for parts in zip(*found, strict=True))
    run.write_edges("retrieval", seeds.ids.take(pa.array(seed)), embedded.ids.take(pa.array(rows)), how)
    asked = np.unique(rows)
    lost = np.setdiff1d(live, asked)
    lost = lost[~run.as_is(embedded.ids)[lost]]
    if len(live) and len(lost) == len(live) and run.config.budget.clustered == 0:
        reasons = [_why_nothing(name, settings, seeds.vectors[own], pool) for name, own in of_set.items()]
        raise UserError(f"nothing is left of pool={run.config.pool}: {'; '.join(reasons)}; {CHANGE}")
    if run.config.budget.clustered > 0:  # then what nobody asked for may still be drawn
        lost = lost[:0]
    run.drop("retrieval", {"id": embedded.ids.take(pa.array(lost)).to_pylist()})
    shared = len(rows) - len(asked)
    each = {f"for {name}": count for name, count in counts.items()} if len(counts) > 1 else {}
    return {"seeds": len(seeds.ids), "asked": len(rows), "shared": shared, **each, "dropped": len(lost)}


def _why_nothing(name: str, settings: RetrievalConfig, seeds: Halves, pool: Pool) -> str:
    """Why no picture is asked for by a set, and by which setting."""
    own = settings.sets.get(name, SetConfig())

    def said(key: str) -> str:
        value, here = getattr(own, key), f"retrieval.sets.{name}.{key}"
        return f"{here}={value}" if value is not None else f"retrieval.{key}={getattr(settings, key)}"

    if settings.of(name, len(seeds)).mode == "samples":
        return f"no picture is as near to one of the {len(seeds)} seeds of {name} as {said('minimum')} asks"
    from curation.kmeans import assign

    most = int(np.bincount(assign(seeds, pool.centroids)[0]).max())
    wanted = said("more_than")
    return f"of the {len(seeds)} seeds of {name} no cluster has more than {wanted}, but at most {most}"


def asked_for(run: Run) -> pa.Array | None:
    """Ids of the pool pictures that seeds asked for; None if there are no seeds."""
    if "seeds" not in run.sets:
        return None
    edges = read_format(run.folder / "edges" / "retrieval.parquet", EDGES_SCHEMA, ["b"])
    return edges["b"].unique()


def ask(pool: Pool, seeds: Halves, settings: RetrievalConfig) -> Found:
    """Pairs of a seed of one set and the row of a live picture that it asks for, by the set's settings."""
    if settings.mode == "clusters":
        found = _by_clusters(pool, seeds, settings)
    else:
        similarity, index = _search(seeds, pool.vectors, settings.k, settings.collisions)
        index[similarity < settings.minimum] = -1
        found = COLLISIONS[settings.collisions](similarity, index, settings.k)
    return _capped(found, settings.cap)


def _sets(run: Run, ids: pa.Array) -> dict[str, Rows]:
    """Rows of the readable seeds by the name of their source."""
    table = run.sets["seeds"].table
    place = pc.index_in(ids, value_set=table["id"].combine_chunks())
    names = np.array(table["source"].cast(pa.string()).take(place).to_pylist(), dtype=object)
    return {name: np.flatnonzero(names == name) for name in sorted(set(names.tolist()))}


def _pool(vectors: Halves, settings: RetrievalConfig, of_set: dict[str, Rows], seed: int) -> Pool:
    modes = {settings.of(name, len(rows)).mode for name, rows in of_set.items()}
    if "clusters" not in modes:
        return Pool(vectors, seed, np.zeros(0, np.int64), np.zeros((0, vectors.shape[1]), np.float32))
    from curation.kmeans import kmeans  # it brings torch

    count = min(len(vectors), settings.clusters or math.isqrt(len(vectors)))
    found = kmeans(vectors, max(1, count), seed=seed)
    return Pool(vectors, seed, found.cluster, found.centroids)


def _by_clusters(pool: Pool, seeds: Halves, settings: RetrievalConfig) -> Found:
    """Up to `each` random pictures of every cluster that holds more than `more_than` seeds.

    Each picture stands beside the seed of its cluster that it is likest to, so that one can see who asked.
    """
    from curation.kmeans import assign

    holds, _ = assign(seeds, pool.centroids)
    generator = np.random.default_rng([pool.seed, 2])
    parts = list(_members(pool, seeds, holds, settings, generator))
    empty = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
    return tuple(np.concatenate(part) for part in zip(empty, *parts, strict=True))  # pyright: ignore[reportReturnType]


def _members(
    pool: Pool, seeds: Halves, holds: Rows, settings: RetrievalConfig, generator: np.random.Generator
) -> Iterator[Found]:
    counts = np.bincount(holds, minlength=len(pool.centroids))
    by_cluster = np.argsort(pool.cluster, kind="stable")
    bounds = np.searchsorted(pool.cluster[by_cluster], np.arange(len(counts) + 1))
    for cluster in np.flatnonzero(counts > settings.more_than).tolist():
        members = by_cluster[bounds[cluster] : bounds[cluster + 1]]
        chosen = np.sort(generator.permutation(members)[: settings.each])
        mine = np.flatnonzero(holds == cluster)
        cosine = pool.vectors[chosen].astype(np.float32) @ seeds[mine].astype(np.float32).T
        best = cosine.argmax(axis=1)
        yield mine[best], chosen, cosine[np.arange(len(chosen)), best].round(4)


def _capped(found: Found, cap: int | None) -> Found:
    """At most `cap` pictures of a set: those likest to a seed, and all seeds that asked for them."""
    seed, place, how = found
    pictures, where = np.unique(place, return_inverse=True)
    if cap is None or len(pictures) <= cap:
        return found
    best = np.full(len(pictures), -np.inf, np.float32)
    np.maximum.at(best, where, how)
    stays = np.zeros(len(pictures), bool)
    stays[np.lexsort((pictures, -best))[:cap]] = True
    mine = stays[where]
    return seed[mine], place[mine], how[mine]


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
