"""Segmentations compared: confusion matrices of pixels, and what is made of them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from evals.dense_data import IGNORED


def confusion(
    truth: Int[Tensor, "*pixels"], answer: Int[Tensor, "*pixels"], classes: int
) -> Int[Tensor, "classes classes"]:
    """How many pixels of each class (row) were taken for each class (column); ignored ones do not count."""
    known = truth != IGNORED
    pairs = truth[known].long() * classes + answer[known].long()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def overlaps(matrix: Int[Tensor, "classes classes"]) -> Int[Tensor, "3 classes"]:
    """Of each class: pixels that both have, the truth has, and the answer has. Sums over pictures add up."""
    return torch.stack([matrix.diagonal(), matrix.sum(1), matrix.sum(0)])


def iou_of_classes(sums: Float[Tensor, "3 classes"]) -> Float[Tensor, "classes"]:
    """Intersection over union of each class (PASCAL VOC's); NaN where neither has a pixel."""
    both, truth, answer = sums.double()
    return both / (truth + answer - both)


def mean_iou(sums: Float[Tensor, "3 classes"]) -> float:
    """Mean over the classes that the truth or the answer has."""
    return float(iou_of_classes(sums).nanmean())


def mean_accuracy(sums: Float[Tensor, "3 classes"]) -> float:
    """Mean share of a class's pixels that were found, over the classes that the truth has."""
    return float((sums.double()[0] / sums.double()[1]).nanmean())


def pixel_accuracy(sums: Float[Tensor, "3 classes"]) -> float:
    both, truth, _ = sums.double().sum(1)
    return float(both / truth)
