"""The measures of DAVIS: region similarity J and contour accuracy F, frame by frame, and what sums them up.

Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation" (CVPR 2016),
sec. 4; several objects as in arXiv 1704.00675.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

TOLERANCE = 0.008  # of the picture's diagonal, how far apart two contours may lie
FOUND = 0.5  # a frame counts for the recall above this
STRETCHES = 4  # of a sequence, whose first and last give the decay
Mask = NDArray[np.bool_]


def region_similarity(truth: Mask, answer: Mask, counted: Mask | None = None) -> float:
    """J: intersection over union; 1 where both are empty. `counted`: the pixels that count; None: all."""
    if counted is not None:
        truth, answer = truth & counted, answer & counted
    union = np.count_nonzero(truth | answer)
    return np.count_nonzero(truth & answer) / union if union else 1.0


def contour_accuracy(truth: Mask, answer: Mask, counted: Mask | None = None) -> float:
    """F: harmonic mean of the contours' precision and recall.

    A pixel of a contour is right where the other contour, dilated by a disk, has it. An empty contour against
    one that is not gives 0; two empty ones give 1.
    """
    if counted is not None:
        truth, answer = truth & counted, answer & counted
    reach = math.ceil(TOLERANCE * math.hypot(*truth.shape))
    ours, theirs = contour(answer), contour(truth)
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    precision = np.count_nonzero(ours & _dilated(theirs, reach)) / np.count_nonzero(ours)
    recall = np.count_nonzero(theirs & _dilated(ours, reach)) / np.count_nonzero(theirs)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def contour(mask: Mask) -> Mask:
    """The pixels that differ from the one to the right, below, or right below; one pixel wide."""
    edge = np.zeros(mask.shape, dtype=bool)
    edge[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    edge[:-1] |= mask[:-1] != mask[1:]
    edge[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return edge


def mean_recall_decay(values: NDArray[np.floating]) -> tuple[float, float, float]:
    """Of a measure over an object's frames: its mean, the share of frames above 0.5, and how much it loses.

    The decay is the mean over the first quarter of the frames less that over the last; neighbouring quarters
    share the frame between them.
    """
    ends = np.round(np.linspace(1, len(values), STRETCHES + 1) + 1e-10).astype(np.int64) - 1
    first, last = values[ends[0] : ends[1] + 1], values[ends[-2] : ends[-1] + 1]
    return float(values.mean()), float((values > FOUND).mean()), float(first.mean() - last.mean())


def _dilated(edge: Mask, reach: int) -> Mask:
    """Pixels within a disk around any of the contour's: those whose distance to it is at most its radius."""
    distance = np.asarray(distance_transform_edt(~edge))
    return distance <= reach
