"""Nearest neighbours by inner product: exact, the vote they take, and near enough among many millions."""

from dinov2.neighbours.approximate import Index, Searcher
from dinov2.neighbours.exact import nearest
from dinov2.neighbours.rows import Rows, Selected
from dinov2.neighbours.vote import knn_classify

__all__ = ["Index", "Rows", "Searcher", "Selected", "knn_classify", "nearest"]
