"""Stage 3: copies inside the pool, found exactly and nearly; of each group one stays.

DINOv2 (app. A): a k-NN graph, edges above a threshold, connected components, one picture kept of each.
Before that come pictures with equal bytes or equal pixels, which count as one. Who stays is a setting; equals
by it, the lowest id. Or SemDeDup (`curation.semdedup`), whose own ranking says who stays.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse import csgraph

from curation.calibrate import threshold_of
from curation.components import Components
from curation.near import Pictures, Rows, near_pairs, start_workers
from curation.run import Run
from dinov2.files import write_table

Similarity = NDArray[np.float32]
EXACT_DIAMETER = 300  # members up to which a component's diameter is exact


def run(run: Run) -> dict[str, Any]:
    """Find duplicates among the pictures that ingest kept; write edges, components and what is dropped."""
    settings = run.config.duplicates
    if not settings.enabled:
        run.drop("duplicates", {"id": []})
        return {"pairs": 0, "components": 0, "dropped": 0, "exact": 0, "near": 0}
    if settings.method != "semdedup":
        start_workers(run, "duplicates", settings)
    pool = Pictures(run, "pool")
    live = np.flatnonzero(run.kept(pool.ids, ["ingest", "filters"]))
    exact, unlike = exact_pairs(pool, live)
    if settings.method == "semdedup":
        from curation.semdedup import semdedup  # it brings torch

        near, likeness = semdedup(pool.vectors, unlike, settings.semdedup, run.config.seed)
        counts = np.ones(len(near), bool)
    else:
        near, likeness = near_pairs(run, "duplicates", pool, unlike, None, settings)
        threshold = threshold_of(run, "duplicates")
        stored = likeness >= min(settings.loosest, threshold)
        near, likeness = near[stored], likeness[stored]
        counts = likeness >= threshold
    pairs = np.concatenate([exact, near])
    similarity = np.concatenate([np.ones(len(exact), np.float32), likeness])
    a, b = (pool.ids.take(pa.array(end)) for end in np.sort(pairs, axis=1).T)
    run.write_edges("duplicate", a, b, similarity)

    counted = np.concatenate([np.ones(len(exact), bool), counts])
    kind = np.arange(len(pool))
    kind[exact[:, 1]] = exact[:, 0]
    groups = Groups.of(kind, pairs[counted], similarity[counted])
    if settings.split is not None:
        groups = groups.split(settings.split)
    if settings.method == "semdedup":
        lost, winner, how = _ranked(exact, near, likeness)
    else:
        rank = _rank(run, pool, groups, settings.keep)
        lost, winner, how = groups.losers(rank, direct=settings.chains == "direct")
    run.drop(
        "duplicates",
        {
            "id": pool.ids.take(pa.array(lost)).to_pylist(),
            "evidence": pool.ids.take(pa.array(winner)).to_pylist(),
            "similarity": how.tolist(),
        },
    )
    _write_components(run, pool, groups, lost, winner, how)
    sizes = np.bincount(groups.component)
    return {
        "pairs": int(counted.sum()),
        "components": int((sizes > 1).sum()),
        "largest": int(sizes.max(initial=0)),
        "exact": len(exact),
        "near": len(lost) - len(exact),
        "dropped": len(lost),
    }


def _ranked(exact: Rows, near: Rows, cosine: Similarity) -> tuple[Rows, Rows, Similarity]:
    """Who goes by SemDeDup: exact copies lose to the first of their kind, others to one ranked higher."""
    lost, winner = np.concatenate([exact[:, 1], near[:, 0]]), np.concatenate([exact[:, 0], near[:, 1]])
    how = np.concatenate([np.ones(len(exact), np.float32), cosine])
    order = np.argsort(lost, kind="stable")
    return lost[order], winner[order], how[order]


def _rank(run: Run, pool: Pictures, groups: "Groups", keep: str) -> Rows:
    """[n] who stays of a component: the highest. What was named `as_is` comes before all others."""
    if keep == "largest":  # of equals the one with more bytes, which is the less compressed
        pixels = pool.table["width"].to_numpy().astype(np.int64) * pool.table["height"].to_numpy()
        value = np.stack([pixels, pool.table["bytes"].to_numpy()], axis=1)
    elif keep == "first":
        table = run.sets["pool"].table
        place = pc.index_in(pool.ids, value_set=table["id"].combine_chunks())
        names = pa.table({"source": table["source"].cast(pa.string()), "uri": table["uri"]})
        order = pc.sort_indices(names, [("source", "ascending"), ("uri", "ascending")]).to_numpy()
        value = -np.argsort(order)[place.to_numpy()]
    else:
        value = groups.likeness_to_others()
    _, rank = np.unique(value, axis=0, return_inverse=True)
    return rank + len(rank) * run.as_is(pool.ids)


def exact_pairs(pool: Pictures, live: Rows) -> tuple[Rows, Rows]:
    """Pairs with equal bytes or pixels, each picture with the first of its kind; and one row of each kind."""
    first = np.arange(len(pool), dtype=np.int64)
    for column in (
        "pixel_sha256",
        "sha256",
    ):  # equal bytes have equal pixels; both are asked, in case decoders differ
        codes = pool.codes(column)[live]
        _, start, place = np.unique(codes, return_index=True, return_inverse=True)
        first[live] = np.minimum(first[live], live[start[place]])
    twins = live[first[live] != live]
    return np.stack([first[twins], twins], axis=1), live[first[live] == live]


@dataclass(frozen=True)
class Groups:
    """Connected components of n pictures by the edges that count."""

    component: Rows  # [n]
    kind: Rows  # [n] the first row of equal bytes or pixels; only this one has edges to other kinds
    pairs: Rows
    similarity: Similarity

    @classmethod
    def of(cls, kind: Rows, pairs: Rows, similarity: Similarity) -> "Groups":
        found = Components(len(kind))
        found.join(pairs[:, 0], pairs[:, 1])
        lowest = found.labels()
        number = np.cumsum(lowest == np.arange(len(kind))) - 1
        return cls(number[lowest], kind, pairs, similarity)

    def likeness_to_others(self) -> NDArray[np.float64]:
        """[n] sum of the likeness to near pictures of other kinds: how central each is."""
        near = _symmetric(*self._near(), len(self.kind))
        # Rounded, so that sums in another order are the same.
        return np.asarray(near.sum(axis=1), np.float64).ravel().round(4)[self.kind]

    def losers(self, rank: NDArray[np.int64], *, direct: bool) -> tuple[Rows, Rows, Similarity]:
        """Who is dropped, whom it lost to, how alike they are. The highest rank stays, then the first row.

        Without an edge between the two, the likeness is that of the weakest edge on the strongest path.

        Args:
            rank: [n], larger is better. direct: a picture goes only if it, or one with equal pixels, has an
            edge to one that stays; so chains of near pictures lose less.
        """
        winner = self._direct_winners(rank) if direct else self._component_winners(rank)
        lost = np.flatnonzero(winner != np.arange(len(winner)))
        return lost, winner[lost], self._likeness(winner)[lost]

    def _component_winners(self, rank: NDArray[np.int64]) -> Rows:
        best = np.full(int(self.component.max(initial=-1)) + 1, -1, np.int64)
        order = np.lexsort((-np.arange(len(rank)), rank))  # worst first: the last one written is the best
        best[self.component[order]] = order
        return best[self.component]

    def _direct_winners(self, rank: NDArray[np.int64]) -> Rows:
        """Best first, each kind stays unless it has an edge to one that stays; it loses to the likest."""
        best = np.empty(len(rank), np.int64)  # of each kind
        worst_first = np.lexsort((-np.arange(len(rank)), rank))
        best[self.kind[worst_first]] = worst_first  # the last one written is the best
        graph, winner = _symmetric(*self._near(), len(rank)), self.kind.copy()
        stays = np.zeros(len(rank), bool)
        kinds = np.unique(self.kind[self.pairs])
        for row in kinds[np.lexsort((best[kinds], -rank[best[kinds]]))].tolist():
            span = slice(graph.indptr[row], graph.indptr[row + 1])
            near, likeness = graph.indices[span], graph.data[span] * stays[graph.indices[span]]
            if likeness.any():
                winner[row] = near[np.lexsort((near, -likeness))[0]]
            else:
                stays[row] = True
        return best[winner[self.kind]]

    def _likeness(self, winner: Rows) -> Similarity:
        """[n] likeness to the winner: of their edge, else of the weakest on the strongest path to it."""
        pairs, similarity = self._near()
        found, goal = np.ones(len(winner), np.float32), self.kind[winner]
        if not len(pairs):
            return found
        members, local = np.unique(pairs, return_inverse=True)
        count, ends = len(members), local.reshape(-1, 2).T  # those alone need no tree
        graph = sparse.csr_matrix((2 - similarity.astype(np.float64), ends), shape=(count, count))
        tree = csgraph.minimum_spanning_tree(graph).tocoo()  # weights are 1 to 2
        roots = np.flatnonzero(goal[members] == members)
        # One search from a node beside all, tied to every root, walks all trees at once.
        edges = (np.append(tree.row, np.full(len(roots), count)), np.append(tree.col, roots))
        joined = sparse.csr_matrix(
            (np.append(tree.data, np.ones(len(roots))), edges), shape=(count + 1, count + 1)
        )
        order, before = csgraph.breadth_first_order(joined, count, directed=False)
        rows, likeness = order[1:], np.ones(count + 1)
        likeness[rows] = 2 - np.asarray((joined + joined.T)[before[rows], rows]).ravel()
        found[members] = _weakest(likeness, before)[:count]
        direct = goal[pairs] == pairs[:, ::-1]
        for side in (0, 1):
            mine = direct[:, side]
            found[pairs[mine, side]] = similarity[mine]
        return found[self.kind]

    def split(self, most: int) -> "Groups":
        """Components of more than `most` pictures, equal ones counted once, cut into smaller ones.

        Their edges join from the likest down, as in single linkage; one that would make a group of more than
        `most` does not count, nor does any other between two such groups.
        """
        kinds = self.kind == np.arange(len(self.kind))
        large = np.bincount(self.component, kinds)[self.component] > most
        rows = np.flatnonzero(large[self.pairs[:, 0]])
        parent, size = self.kind.copy(), np.ones(len(large), np.int64)

        def root(row: int) -> int:
            while parent[row] != row:
                parent[row] = parent[parent[row]]
                row = int(parent[row])
            return row

        for edge in rows[np.lexsort((rows, -self.similarity[rows]))].tolist():
            low, high = sorted(map(root, self.pairs[edge].tolist()))
            if low != high and size[low] + size[high] <= most:
                parent[high], size[low] = low, size[low] + size[high]
        group = np.full(len(large), -1)
        members = np.flatnonzero(large)
        group[members] = [root(row) for row in members.tolist()]
        inside = group[self.pairs[:, 0]] == group[self.pairs[:, 1]]
        return Groups.of(self.kind, self.pairs[inside], self.similarity[inside])

    def diameters(self) -> Rows:
        """[components] edges between the two farthest members; of large ones a lower bound (two sweeps)."""
        graph = _symmetric(self.pairs, np.ones_like(self.similarity), len(self.component))
        order = np.argsort(self.component, kind="stable")
        bounds = np.searchsorted(self.component[order], np.arange(self.component.max(initial=-1) + 2))
        found = np.minimum(np.diff(bounds) - 1, 1)  # alone 0, two 1
        for number in np.flatnonzero(np.diff(bounds) > 2).tolist():
            members = order[bounds[number] : bounds[number + 1]]
            inside = graph[members][:, members]
            start = [0] if len(members) > EXACT_DIAMETER else None
            hops = csgraph.shortest_path(inside, directed=False, unweighted=True, indices=start)
            if start is not None:
                hops = csgraph.shortest_path(inside, directed=False, unweighted=True, indices=[hops.argmax()])
            found[number] = int(hops.max())
        return found

    def _near(self) -> tuple[Rows, Similarity]:
        """The pairs of two kinds."""
        near = self.kind[self.pairs[:, 0]] != self.kind[self.pairs[:, 1]]
        return self.pairs[near], self.similarity[near]


def _symmetric(pairs: Rows, weights: Similarity, count: int) -> sparse.csr_matrix:
    """[count, count] with the weight of each pair in both places."""
    both = np.concatenate([pairs, pairs[:, ::-1]])
    return sparse.csr_matrix((np.concatenate([weights, weights]), both.T), shape=(count, count))


def _weakest(likeness: NDArray[np.float64], before: NDArray[np.integer]) -> NDArray[np.float64]:
    """The least likeness on the way from each node to the root; by jumps, each twice as far as the last.

    Args:
        before: the next node on the way; negative for the root.
    """
    before = np.where(before < 0, np.arange(len(before)), before)
    while True:
        likeness = np.minimum(likeness, likeness[before])
        further = before[before]
        if np.array_equal(further, before):
            return likeness
        before = further


def _write_components(
    run: Run, pool: Pictures, groups: Groups, lost: Rows, winner: Rows, how: Similarity
) -> None:
    """`components.parquet`: pictures with company; size and diameter of it, their likeness to who stays."""
    sizes = np.bincount(groups.component, minlength=1)[groups.component]
    members = np.flatnonzero(sizes > 1)
    likeness = np.ones(len(sizes), np.float32)
    likeness[lost] = how
    table = {
        "id": pool.ids.take(members),
        "component": groups.component[members],
        "size": sizes[members],
        "diameter": groups.diameters()[groups.component[members]],
        "kept": ~np.isin(members, lost),
        "similarity": likeness[members],
    }
    write_table(run.stage("duplicates") / "components.parquet", pa.table(table))
