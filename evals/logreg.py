"""Logistic regression on frozen features (DINOv2, arXiv 2304.07193, app. B.3): 45 values of C, scikit-learn.

C is chosen on a holdout of the training pictures; the model is then fitted to all of them.
"""

from dataclasses import dataclass
from pathlib import Path

from dinov2.config import at_least
from dinov2.exits import UserError
from dinov2.pages import Page
from dinov2.pages.charts import curve
from evals.bench import Bench
from evals.config import LabelledConfig
from evals.data import Parts, labelled_parts
from evals.drawing import draw_classification, draw_examples
from evals.logistic import Search
from evals.per_class import mean_per_class
from evals.results import Outcome
from evals.task import Task
from evals.vectors import vectors_of


@dataclass(frozen=True, kw_only=True)
class LogregConfig(LabelledConfig):
    token: str = "cls"  # what is regressed on; or cls4, of the last four blocks, mean, or several joined by +
    least_c: float = 1e-6  # the smallest weight of the loss against the penalty
    most_c: float = 1e5  # the largest
    values: int = 45  # of C, evenly spread in their logarithm
    holdout: float = 0.1  # share of each training class that C is chosen on
    iterations: int = 1000  # of L-BFGS at most, for each value
    tolerance: float = 1e-4  # of the gradient, at which it stops

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "values", "iterations")
        if not 0 < self.least_c <= self.most_c:
            raise UserError(f"least_c={self.least_c}, most_c={self.most_c}: give two above 0, in this order")
        if not 0 < self.holdout < 1:
            raise UserError(f"holdout={self.holdout}: give a share between 0 and 1")

    @property
    def search(self) -> Search:
        return Search(
            least_c=self.least_c,
            most_c=self.most_c,
            values=self.values,
            holdout=self.holdout,
            iterations=self.iterations,
            tolerance=self.tolerance,
            seed=self.seed,
        )


def run(bench: Bench, parts: Parts, config: LogregConfig, work: Path) -> Outcome:
    """Top-1 accuracy with the C that is best on the holdout."""
    train, test = (vectors_of(bench, part, config.token) for part in (parts.train, parts.test))
    search = config.search
    with bench.timed("training"):
        model, held = search.run(train.rows, train.labels, parts, work)
    answers = model.predict(test.rows, parts.allowed)
    scores = (answers == test.labels).double().numpy()

    def draw(page: Page) -> None:
        page.heading("The choice of C")
        page.figure(curve({"": (search.grid, held)}, x="C", y="top-1 on the holdout, %", log_x=True))
        draw_classification(page, parts, test.ids, test.labels, answers)
        draw_examples(page, parts, test.ids, test.labels, answers)

    reached = [{"c": c, "holdout_top1": top1} for c, top1 in zip(search.grid, held, strict=True)]
    best = max(reached, key=lambda one: one["holdout_top1"])
    mean_class, spread = mean_per_class(scores, test.labels)
    return Outcome(
        headline="top1",
        metrics={"top1": 100 * float(scores.mean()), "mean_class": mean_class},
        scores={"top1": scores},
        intervals={"mean_class": spread},
        details={"best": best, "converged": model.converged, "grid": reached, **parts.details},
        draw=draw,
    )


TASK = Task(LogregConfig, labelled_parts, run, "logistic regression, a grid of C")
