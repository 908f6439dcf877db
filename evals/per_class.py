"""Accuracy in which every class counts alike, however many test pictures it has.

Aircraft, Caltech101, Flowers and Pets are reported so (SimCLR, arXiv 2002.05709, app. B.8, and after it).
"""

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from evals.bootstrap import of_statistic


def mean_per_class(right: NDArray[np.floating], truth: Int[Tensor, "n"]) -> tuple[float, tuple[float, float]]:
    """The mean over the classes of the share that is right, in percent, and its interval.

    Args:
        right: of each picture 1 or 0, or the share of several tries [n].
        truth: its class. Classes without a picture do not count.
    """
    classes = truth.numpy()

    def figure(times: NDArray[np.integer]) -> float:
        pictures = np.bincount(classes, times)
        hits = np.bincount(classes, times * right)
        return 100 * float((hits[pictures > 0] / pictures[pictures > 0]).mean())

    return figure(np.ones(len(right), np.int64)), of_statistic(figure, len(right))
