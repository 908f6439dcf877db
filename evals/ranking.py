"""Figures of rankings: average precision of several definitions, precision and recall among the first k.

Where equal scores could be ordered in more than one way, each function says what it does. A backbone whose
features have collapsed scores everything alike, and must not look good by the order of the files.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor


def revisited(
    positive: Int[np.ndarray, "positives"], junk: Int[np.ndarray, "junk"], k: tuple[int, ...]
) -> tuple[float, dict[int, float]]:
    """Average precision and precision at k of one query (revisited Oxford and Paris, arXiv 1803.11285).

    Junk is taken out of the ranking. The area under precision over recall is summed by trapezoids, as in the
    original Oxford protocol. Precision is among the first k, or up to the last positive if it comes before.

    Args:
        positive, junk: ranks from 0 in the whole ranking, in any order.

    Returns:
        Both from 0 to 1; NaN if there is no positive.
    """
    if not len(positive):
        return float("nan"), dict.fromkeys(k, float("nan"))
    places = np.sort(positive)
    places = places - np.searchsorted(np.sort(junk), places)
    found = np.arange(len(places))
    after = (found + 1) / (places + 1)
    before = np.divide(found, places, out=np.ones(len(places)), where=places > 0)
    last = int(places[-1]) + 1
    at = {one: int((places < min(one, last)).sum()) / min(one, last) for one in k}
    return float((before + after).sum() / 2 / len(places)), at


@dataclass(frozen=True)
class Ranked:
    """What each query found.

    Attributes:
        precision: average precision from 0 to 1; NaN where nothing is relevant.
        first: the rank, from 0, of the first relevant row; the number of rows where nothing is relevant.
    """

    precision: Float[Tensor, "queries"]
    first: Int[Tensor, "queries"]


def ranked(
    scores: Float[Tensor, "queries rows"],
    relevant: Bool[Tensor, "queries rows"],
    left_out: Bool[Tensor, "queries rows"] | None = None,
) -> Ranked:
    """Average precision of each query as scikit-learn defines it: equal scores are one threshold.

    So their order does not matter, and scores that are all equal have the precision of chance. For `first`,
    half of the irrelevant rows of an equal score are taken to come before: the middle of all orders.
    """
    if left_out is not None:
        scores = scores.masked_fill(left_out, -torch.inf)
        relevant = relevant & ~left_out
    ordered, order = scores.sort(dim=1, descending=True)
    hits = relevant.gather(1, order)
    total, rows = hits.sum(1), scores.shape[1]
    place = torch.arange(rows, device=scores.device).expand_as(order)
    ends = torch.ones_like(hits)
    ends[:, :-1] = ordered[:, 1:] != ordered[:, :-1]
    # The last row of each row's group of equal scores: the nearest end at or after it.
    last = torch.where(ends, place, rows).flip(1).cummin(1).values.flip(1)
    found = hits.cumsum(1).gather(1, last)
    precision = (hits * found / (last + 1)).sum(1) / total
    first = _first(hits, place, last)
    return Ranked(precision, torch.where(total > 0, first, rows))


def _first(hits: Tensor, place: Tensor, last: Tensor) -> Tensor:
    """The rank of the first hit, in the middle of the misses that score as it does."""
    chosen = hits.int().argmax(1, keepdim=True)
    end = last.gather(1, chosen)
    group = last == end
    start = torch.where(group, place, place.shape[1]).amin(1)
    misses = (group & ~hits).sum(1)
    return start + misses // 2


def micro_average_precision(
    scores: NDArray[np.floating],
    right: NDArray[np.bool_],
    total: float,
    weights: NDArray[np.number] | None = None,
) -> float:
    """Area under precision over recall of all pairs of all queries in one ranking (DISC, arXiv 2106.09672).

    Equal scores are one threshold. Pairs that were not proposed are never found.

    Args:
        scores, right: of each proposed pair of query and reference.
        total: pairs that there are to be found, proposed or not (the sum of their weights).
        weights: how often each pair counts.

    Returns:
        0 to 1; NaN if there is nothing to be found.
    """
    if not total:
        return float("nan")
    weights = np.ones(len(scores)) if weights is None else weights
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1) if len(scores) else order
    found = np.cumsum((weights * right)[order])[ends]
    seen = np.cumsum(weights[order])[ends]
    gained = np.diff(found, prepend=0)
    return float(np.sum(gained * np.divide(found, seen, out=np.zeros(len(seen)), where=seen > 0)) / total)


def recall_at_precision(
    scores: NDArray[np.floating], right: NDArray[np.bool_], total: float, precision: float
) -> tuple[float, float]:
    """The largest recall of any threshold with at least this precision, and the threshold (or infinity)."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1) if len(scores) else order
    found = np.cumsum(right[order])[ends]
    good = np.flatnonzero(found >= precision * (ends + 1))
    if not len(good) or not found[good[-1]]:
        return 0.0, float("inf")
    return float(found[good[-1]] / total), float(scores[order][ends[good[-1]]])
