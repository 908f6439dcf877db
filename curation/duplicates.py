"""Stage 3: copies inside the pool, found exactly and nearly; of each group one stays.

DINOv2 (app. A): a k-NN graph, edges above a threshold, connected components, one picture kept of each.
Before that come pictures with equal bytes or equal pixels. The largest picture stays (pixels, then lowest
id).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse import csgraph

from curation.near import Pictures, Rows, near_pairs
from curation.run import Run
from dinov2.files import write_table

Similarity = NDArray[np.float32]


def run(run: Run) -> dict[str, Any]:
    """Find duplicates among the pictures that ingest kept; write edges, components and what is dropped."""
    settings = run.config.duplicates
    if not settings.enabled:
        run.drop("duplicates", {"id": []})
        return {"pairs": 0, "components": 0, "dropped": 0, "exact": 0, "near": 0}
    pool = Pictures(run, "pool")
    live = np.flatnonzero(run.kept(pool.ids, ["ingest"]))
    exact, unlike = exact_pairs(pool, live)
    candidates, similarity = near_pairs(run, "duplicates", pool, unlike, None, settings)
    stored = similarity >= settings.stored_from
    pairs = np.concatenate([exact, candidates.pairs[stored]])
    similarity = np.concatenate([np.ones(len(exact), np.float32), similarity[stored]])
    run.write_edges("duplicate", pool.ids.take(pairs[:, 0]), pool.ids.take(pairs[:, 1]), similarity)

    counted = similarity >= settings.threshold
    groups = Groups.of(len(pool), pairs[counted], similarity[counted])
    pixels = (pool.table["width"].to_numpy().astype(np.int64) * pool.table["height"].to_numpy())[: len(pool)]
    lost, winner, how = groups.losers(pixels, direct=settings.chains == "direct")
    run.drop(
        "duplicates",
        {
            "id": pool.ids.take(lost).to_pylist(),
            "evidence": pool.ids.take(winner).to_pylist(),
            "similarity": how.tolist(),
        },
    )
    _write_components(run, pool, groups, lost, winner, how)
    sizes = np.bincount(groups.component)
    return {
        "candidates": len(candidates.pairs),
        "pairs": int(counted.sum()),
        "components": int((sizes > 1).sum()),
        "largest": int(sizes.max(initial=0)),
        "exact": len(exact),
        "near": len(lost) - len(exact),
        "dropped": len(lost),
    }


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
    pairs: Rows
    similarity: Similarity

    @classmethod
    def of(cls, count: int, pairs: Rows, similarity: Similarity) -> "Groups":
        graph = sparse.coo_matrix((np.ones(len(pairs)), pairs.T), shape=(count, count))
        _, component = csgraph.connected_components(graph, directed=False)
        return cls(component.astype(np.int64), pairs, similarity)

    def losers(self, rank: NDArray[np.int64], *, direct: bool) -> tuple[Rows, Rows, Similarity]:
        """Who is dropped, whom it lost to, how alike they are. The highest rank stays, then the first row.

        Without an edge between the two, the likeness is that of the weakest edge on the strongest path.

        Args:
            rank: [n], larger is better. direct: a picture goes only if it has an edge to one that stays;
            so chains of near pictures lose less.
        """
        winner = self._direct_winners(rank) if direct else self._component_winners(rank)
        lost = np.flatnonzero(winner != np.arange(len(winner)))
        return lost, winner[lost], self._likeness(winner)[lost]

    def _component_winners(self, rank: NDArray[np.int64]) -> Rows:
        best = np.full(int(self.component.max(initial=-1)) + 1, -1, np.int64)
        for row in np.lexsort((-np.arange(len(rank)), rank)):  # worst first: the last one written is the best
            best[self.component[row]] = row
        return best[self.component]

    def _direct_winners(self, rank: NDArray[np.int64]) -> Rows:
        """Best first, each picture stays unless it has an edge to one that stays; it loses to the likest."""
        graph = self._graph(self.similarity)
        winner = np.arange(len(rank), dtype=np.int64)
        stays = np.zeros(len(rank), bool)
        for row in np.lexsort((np.arange(len(rank)), -rank)):
            span = slice(graph.indptr[row], graph.indptr[row + 1])
            near, likeness = graph.indices[span], graph.data[span] * stays[graph.indices[span]]
            if likeness.any():
                winner[row] = near[np.lexsort((near, -likeness))[0]]
            else:
                stays[row] = True
        return winner

    def _likeness(self, winner: Rows) -> Similarity:
        """[n] likeness to the winner: of their edge, else of the weakest on the strongest path to it."""
        count = len(winner)
        tree = csgraph.minimum_spanning_tree(self._graph(2 - self.similarity)).tocoo()  # weights are 1 to 2
        roots = np.flatnonzero(winner == np.arange(count))
        # One search from a node beside all, tied to every root, walks all trees at once.
        ends = (np.append(tree.row, np.full(len(roots), count)), np.append(tree.col, roots))
        joined = sparse.csr_matrix(
            (np.append(tree.data, np.ones(len(roots))), ends), shape=(count + 1, count + 1)
        )
        order, before = csgraph.breadth_first_order(joined, count, directed=False)
        rows = order[1:]
        steps = 2 - np.asarray((joined + joined.T)[before[rows], rows]).ravel()
        likeness = np.ones(count + 1, np.float32)
        for row, step in zip(rows.tolist(), steps.tolist(), strict=True):
            likeness[row] = min(likeness[before[row]], step)
        direct = winner[self.pairs] == self.pairs[:, ::-1]
        for side in (0, 1):
            mine = direct[:, side]
            likeness[self.pairs[mine, side]] = self.similarity[mine]
        return likeness[:count]

    def _graph(self, weights: Similarity) -> sparse.csr_matrix:
        count = len(self.component)
        both = np.concatenate([self.pairs, self.pairs[:, ::-1]])
        return sparse.csr_matrix((np.concatenate([weights, weights]), both.T), shape=(count, count))


def _write_components(
    run: Run, pool: Pictures, groups: Groups, lost: Rows, winner: Rows, how: Similarity
) -> None:
    """`components.parquet`: pictures with company, the component's size, their likeness to who stays."""
    sizes = np.bincount(groups.component, minlength=1)[groups.component]
    members = np.flatnonzero(sizes > 1)
    likeness = np.ones(len(sizes), np.float32)
    likeness[lost] = how
    table = {
        "id": pool.ids.take(members),
        "component": groups.component[members],
        "size": sizes[members],
        "kept": ~np.isin(members, lost),
        "similarity": likeness[members],
    }
    write_table(run.stage("duplicates") / "components.parquet", pa.table(table))
