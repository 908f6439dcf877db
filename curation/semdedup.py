"""SemDeDup (Abbas et al. 2023, arXiv 2303.09540): near copies dropped inside k-means clusters.

Pictures are clustered by spherical k-means. Inside a cluster they are ranked, the farthest from the centroid
first, and one that has a cosine above 1 - eps to one ranked before it goes. This can be read in two ways:

- `any`: one ranked before it counts whether it stays or went itself (the pseudo-code of app. A);
- `kept`: only one that stays counts (sec. 3: of a group of copies one is kept), so that of a chain of near
  pictures every second may stay.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from curation.config import SemDeDupConfig
from dinov2.neighbours import Rows as Vectors
from dinov2.neighbours.rows import Selected

Rows = NDArray[np.int64]
Similarity = NDArray[np.float32]

TILE = 2048  # rows whose similarities to a cluster are held at a time


def semdedup(vectors: Vectors, rows: Rows, settings: SemDeDupConfig, seed: int) -> tuple[Rows, Similarity]:
    """Who goes, and for whom, among `rows` of L2-normalised vectors.

    Returns:
        pairs [p, 2] of a row that goes and the likest row ranked before it that counts, and their cosine.
    """
    from curation.kmeans import kmeans  # it brings torch

    count = min(len(rows), settings.clusters or max(1, math.isqrt(len(rows))))
    found = kmeans(Selected(vectors, rows), count, seed=seed, spherical=True)
    pairs, cosines = [np.zeros((0, 2), np.int64)], [np.zeros(0, np.float32)]
    ranked = np.lexsort((rows, -found.distance.round(4), found.cluster))
    bounds = np.searchsorted(found.cluster[ranked], np.arange(len(found.centroids) + 1))
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        members = rows[ranked[start:stop]]
        for lost, winner, cosine in _inside(vectors, members, 1 - settings.eps, settings.reading):
            pairs.append(np.stack([members[lost], members[winner]], axis=1))
            cosines.append(cosine)
    joined, cosine = np.concatenate(pairs), np.concatenate(cosines)
    order = np.lexsort((joined[:, 1], joined[:, 0]))
    return joined[order], cosine[order].round(4)


def _inside(
    vectors: Vectors, members: Rows, least: float, reading: str
) -> Iterator[tuple[Rows, Rows, Similarity]]:
    """Places in the ranking of those that go and of whom they lose to, and their cosines, tile by tile."""
    stays = np.ones(len(members), bool)
    for first in range(0, len(members), TILE):
        tile = np.asarray(vectors[members[first : first + TILE]]).astype(np.float32)
        best, where = np.full(len(tile), -np.inf, np.float32), np.zeros(len(tile), np.int64)
        for at in range(0, first, TILE):
            earlier = np.asarray(vectors[members[at : at + TILE]]).astype(np.float32)
            cosine = tile @ earlier.T
            if reading == "kept":
                cosine[:, ~stays[at : at + TILE]] = -np.inf
            top = cosine.argmax(axis=1)
            value = cosine[np.arange(len(tile)), top]
            better = value > best
            best[better], where[better] = value[better], top[better] + at
        own = tile @ tile.T
        for place in range(len(tile)):
            before = own[place, :place]
            if reading == "kept":
                before = np.where(stays[first : first + place], before, -np.inf)
            if place and before[top := int(before.argmax())] > best[place]:
                best[place], where[place] = before[top], top + first
            stays[first + place] = best[place] <= least
        lost = np.flatnonzero(best > least)
        yield lost + first, where[lost], best[lost]
