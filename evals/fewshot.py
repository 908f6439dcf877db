"""Classification from few pictures of each class, drawn several times.

`centroid`: the class whose mean is nearest, after subtracting the mean of what was drawn and normalising
(SimpleShot, arXiv 1911.04623, CL2N). `logreg`: logistic regression on the features as they are, with one C.
The figure is the mean over the draws; its interval is that of this mean, by Student's t over the draws, and
says nothing of the test pictures, which are the same in all.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from dinov2.config import at_least, listed, one_of
from dinov2.exits import UserError
from dinov2.pages import Page
from dinov2.pages.charts import curve
from evals.bench import Bench
from evals.config import LabelledConfig
from evals.data import Parts, labelled_parts, per_class_draws
from evals.drawing import draw_classification, draw_examples
from evals.logistic import Logistic
from evals.results import Outcome
from evals.task import Task
from evals.vectors import Vectors, vectors_of

HEADLINE = 5  # shots
METHODS = ("centroid", "logreg")


@dataclass(frozen=True, kw_only=True)
class FewshotConfig(LabelledConfig):
    shots: list[int] = listed(
        1, 2, 5, 10, 20
    )  # training pictures of each class; left out beyond the smallest
    tries: int = 10  # draws of each
    method: str = "centroid"  # or logreg
    token: str = "cls"  # what is compared; or mean, of the patch tokens, or several joined by +
    c: float = 1.0  # of logreg: weight of the loss against the penalty

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(2, self, "tries")
        one_of(self.method, METHODS, "method")
        if not self.shots or min(self.shots) < 1:
            raise UserError(f"shots={self.shots}: give one or more numbers from 1 up")
        if self.c <= 0:
            raise UserError(f"c={self.c}: give more than 0")


def run(bench: Bench, parts: Parts, config: FewshotConfig, work: Path) -> Outcome:
    """Mean top-1 accuracy for each number of shots. The headline is 5, or the nearest that is there."""
    train, test = (vectors_of(bench, part, config.token) for part in (parts.train, parts.test))
    smallest = int(train.labels.bincount(minlength=len(parts.classes)).min())
    if smallest == 0:
        raise UserError("a class has no readable training picture")
    kept = sorted({shots for shots in config.shots if shots <= smallest}) or [smallest]
    answers = {shots: _answers(train, test, shots, parts, config) for shots in kept}
    shares = {
        f"top1_n{shots}": [100 * float((one == test.labels).double().mean()) for one in several]
        for shots, several in answers.items()
    }
    headline = min(kept, key=lambda shots: (abs(shots - HEADLINE), shots))

    def draw(page: Page) -> None:
        page.heading("Shots")
        means = [float(np.mean(several)) for several in shares.values()]
        page.figure(curve({"mean": (kept, means)}, x="pictures of each class", y="top-1, %", log_x=True))
        draw_classification(page, parts, test.ids, test.labels, answers[headline][0])
        draw_examples(page, parts, test.ids, test.labels, answers[headline][0])

    return Outcome(
        headline=f"top1_n{headline}",
        metrics={name: float(np.mean(several)) for name, several in shares.items()},
        intervals={name: interval_of_tries(several) for name, several in shares.items()},
        details={"tries": shares, **parts.details},
        draw=draw,
    )


def interval_of_tries(values: list[float]) -> tuple[float, float]:
    """The 95% interval of the mean of a few independent tries (Student's t)."""
    from scipy.stats import t

    reach = float(t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return float(np.mean(values)) - reach, float(np.mean(values)) + reach


def nearest_centroid(
    train: Float[Tensor, "m dim"],
    labels: Int[Tensor, "m"],
    test: Float[Tensor, "n dim"],
    allowed: Bool[Tensor, "classes"],
) -> Int[Tensor, "n"]:
    """The allowed class with the nearest mean, of rows centred on the training mean and made of length 1."""
    centre = train.mean(0)
    rows, queries = (normalize(part - centre, dim=1) for part in (train, test))
    sums = torch.zeros(len(allowed), rows.shape[1]).index_add_(0, labels, rows)
    means = sums / labels.bincount(minlength=len(allowed)).clamp(min=1)[:, None]
    return torch.cdist(queries, means).masked_fill(~allowed, torch.inf).argmin(1)


def _answers(
    train: Vectors, test: Vectors, shots: int, parts: Parts, config: FewshotConfig
) -> list[Int[Tensor, "n"]]:
    found = []
    for rows in per_class_draws(train.labels, shots, config.tries, config.seed):
        drawn, labels = train.rows[rows], train.labels[rows]
        if config.method == "centroid":
            found.append(nearest_centroid(drawn, labels, test.rows, parts.allowed))
        else:
            found.append(Logistic().fit(drawn, labels, config.c).predict(test.rows, parts.allowed))
    return found


TASK = Task(FewshotConfig, labelled_parts, run, "classes from a few pictures of each")
