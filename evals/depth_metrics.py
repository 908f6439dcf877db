"""Depths compared: the errors of Eigen et al. (arXiv 1406.2283), each a mean over a picture's pixels."""

import numpy as np
from numpy.typing import NDArray

# Shares of height and width that count: top, bottom, left, right.
CROPS = {
    "none": (0.0, 1.0, 0.0, 1.0),
    "eigen": (45 / 480, 471 / 480, 41 / 640, 601 / 640),  # NYUv2: within the white frame of its pictures
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),  # KITTI: Garg et al. (arXiv 1603.04992)
}
NEAR = 1e-3  # metres; what is nearer is no depth
METRICS = ("rmse", "abs_rel", "log10", "delta1", "delta2", "delta3")


def counted(truth: NDArray[np.floating], *, far: float, crop: str) -> NDArray[np.bool_]:
    """The pixels that count: those of the crop whose depth is known and not too far."""
    height, width = truth.shape
    sides = (height, height, width, width)
    # Whole pixels, as published; a share of 471 / 480 must not become row 470 by rounding.
    top, bottom, left, right = (
        int(part * side + 1e-6) for part, side in zip(CROPS[crop], sides, strict=True)
    )
    inside = np.zeros(truth.shape, dtype=bool)
    inside[top:bottom, left:right] = True
    return inside & (truth > NEAR) & (truth < far)


def errors(
    truth: NDArray[np.floating], answer: NDArray[np.floating], where: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """`METRICS` of one picture, over the pixels `where`; NaN where there is none. Answers must be above 0.

    Root of the mean squared error in metres, mean of |error| / truth, mean |error| of the logarithm to base
    10, and the shares of pixels where the larger of answer / truth and truth / answer is below 1.25, 1.25²
    and 1.25³.
    """
    if not where.any():
        return np.full(len(METRICS), np.nan)
    true, found = truth[where].astype(np.float64), answer[where].astype(np.float64)
    ratio = np.maximum(true / found, found / true)
    return np.array(
        [
            np.sqrt(np.mean((true - found) ** 2)),
            np.mean(np.abs(true - found) / true),
            np.mean(np.abs(np.log10(true) - np.log10(found))),
            *(np.mean(ratio < 1.25**power) for power in (1, 2, 3)),
        ],
        dtype=np.float64,
    )
