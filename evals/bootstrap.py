"""95% intervals: percentiles over bootstrap samples of the test pictures.

Every interval answers the same question: how far would the figure move if the test pictures were others of
their kind? What was learnt or searched stays as it is.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000  # samples of a mean; those of other figures, which cost more each, are fewer
COVERED = (2.5, 97.5)
FEW = 64  # different scores, up to which counting them is quicker than picking pictures


def of_mean(scores: NDArray[np.floating], *, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """The interval of the mean of what each picture scores [n], in percent."""
    generator = np.random.default_rng(seed)
    values, counts = np.unique(scores, return_counts=True)
    if len(values) <= FEW:
        # Drawing pictures with replacement is drawing how often each value comes.
        drawn = generator.multinomial(len(scores), counts / len(scores), size=draws)
        means = drawn @ values / len(scores)
    else:
        means = [scores[generator.integers(len(scores), size=len(scores))].mean() for _ in range(draws)]
    low, high = np.percentile(means, COVERED)
    return 100 * float(low), 100 * float(high)


def of_sums(
    parts: NDArray[np.number],
    finish: Callable[[NDArray[np.floating]], NDArray[np.floating] | float],
    *,
    draws: int = DRAWS // 2,
    seed: int = 0,
) -> tuple[float, float]:
    """The interval of a figure that is made of sums over pictures, such as mIoU of their confusions.

    Args:
        parts: what each picture adds to the sums, [n, …].
        finish: the sums […] to the figure, in its own unit; NaN where a draw leaves it undefined.
    """
    flat = parts.reshape(len(parts), -1).astype(np.float64)

    def figure(weights: NDArray[np.int64]) -> float:
        return float(finish((weights @ flat).reshape(parts.shape[1:])))

    return of_statistic(figure, len(parts), draws=draws, seed=seed)


def of_statistic(
    figure: Callable[[NDArray[np.int64]], float],
    pictures: int,
    *,
    draws: int = DRAWS // 2,
    seed: int = 0,
    around: float | None = None,
) -> tuple[float, float]:
    """The interval of any figure over pictures, such as the average precision of a ranking.

    Args:
        figure: how often each picture was drawn, int64 [n], to the figure, in its own unit; NaN where a draw
            leaves it undefined, as when no picture of a class was drawn: such draws do not count.
        pictures: n.
        around: the figure itself, to which the draws' mean is moved: for figures that are biased where a
            picture is drawn twice, as those are that ask which pictures lie together.
    """
    generator = np.random.default_rng(seed)
    drawn = (generator.integers(pictures, size=pictures) for _ in range(draws))
    found = np.array([figure(np.bincount(rows, minlength=pictures)) for rows in drawn])
    known = found[np.isfinite(found)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.percentile(known, COVERED) + (0.0 if around is None else around - known.mean())
    return float(low), float(high)
