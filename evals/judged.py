"""What queries propose in copy detection, and the figures of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinov2.pages import Page
from dinov2.pages.charts import histogram
from evals.bootstrap import of_statistic, of_sums
from evals.found import Found
from evals.ranking import micro_average_precision, recall_at_precision
from evals.results import Outcome

PRECISION = 0.9  # at which recall is also reported, as in DISC


@dataclass(frozen=True)
class Judged:
    """What each query proposes.

    Attributes:
        scores, rows, right: [queries, k], the best first.
        wanted: how many references each query is a copy of.
    """

    scores: NDArray[np.float64]
    rows: NDArray[np.int64]
    right: NDArray[np.bool_]
    wanted: NDArray[np.int64]

    def part(self, queries: NDArray[np.bool_]) -> "Judged":
        return Judged(self.scores[queries], self.rows[queries], self.right[queries], self.wanted[queries])

    def micro_ap(self, counts: NDArray[np.integer] | None = None, total: float | None = None) -> float:
        """With each query counted so often; `total` pairs to be found, by default those of these queries."""
        weight = np.ones(len(self.wanted)) if counts is None else counts.astype(np.float64)
        total = float(weight @ self.wanted) if total is None else total
        weights = np.repeat(weight, self.scores.shape[1])
        return micro_average_precision(self.scores.ravel(), self.right.ravel(), total, weights)

    def first(self) -> float:
        """The share of copies whose nearest reference is right; 0 where there are no copies."""
        some = self.wanted > 0
        return float(self.right[some, 0].mean()) if some.any() else 0.0

    def found(self) -> list[Found]:
        """Of the queries that are copies of something."""
        some = np.flatnonzero(self.wanted)
        some = some[np.linspace(0, len(some) - 1, min(len(some), 600)).astype(int)]
        return [
            Found(int(query), self.rows[query].tolist(), {*self.rows[query][self.right[query]].tolist()})
            for query in some
        ]


def outcome_of(
    judged: Judged,
    owner: NDArray[np.int64],
    total: int,
    details: dict[str, Any],
    draw: Callable[[Page], None],
) -> Outcome:
    """Micro-AP, recall at 90% precision, and the share of copies whose nearest is right.

    Args:
        owner: the picture that each query is made of. Intervals draw these, with all that is made of them.
        total: pairs that there are to be found.
    """
    copies = judged.wanted > 0
    recall, threshold = recall_at_precision(judged.scores.ravel(), judged.right.ravel(), total, PRECISION)
    unseen = total - int(judged.wanted.sum())  # pairs of which a picture cannot be read

    def micro_ap(counts: NDArray[np.integer]) -> float:
        mine = counts[owner]
        return 100 * judged.micro_ap(mine, float(mine @ judged.wanted) + unseen)

    pictures = int(owner.max()) + 1
    first = [
        np.bincount(owner[copies], weights, pictures) for weights in (judged.right[copies, 0], copies[copies])
    ]
    return Outcome(
        headline="micro_ap",
        metrics={
            "micro_ap": 100 * judged.micro_ap(total=total),
            "recall@p90": 100 * recall,
            "recall@1": 100 * judged.first(),
        },
        intervals={
            "micro_ap": of_statistic(micro_ap, pictures),
            "recall@1": of_sums(np.stack(first, axis=1), _share),
        },
        details=details
        | {
            "queries": len(judged.wanted),
            "pairs": total,
            "threshold at 90% precision": threshold if np.isfinite(threshold) else None,
        },
        draw=draw,
    )


def _share(sums: NDArray[np.floating]) -> float:
    return 100 * float(sums[0] / sums[1]) if sums[1] else float("nan")


def draw_scores(page: Page, judged: Judged) -> None:
    page.heading("Scores")
    page.figure(
        histogram(
            {
                "a copy and its original": judged.scores[judged.right],
                "the nearest that is no original": _nearest_wrong(judged),
            },
            x="score",
            y="pairs",
        ),
        "Where both overlap, no threshold tells a copy from a picture that is only alike.",
    )


def _nearest_wrong(judged: Judged) -> NDArray[np.float64]:
    wrong = np.where(judged.right, -np.inf, judged.scores).max(1)
    return wrong[np.isfinite(wrong)]
