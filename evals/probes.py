"""Classifiers on features that the robustness tasks measure by: nearest neighbours, or a linear one."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float, Int
from torch import Tensor

from dinov2.config import at_least, one_of
from dinov2.exits import UserError
from dinov2.neighbours import knn_classify
from evals.bench import Bench
from evals.config import LabelledConfig
from evals.data import Parts
from evals.logistic import Search
from evals.vectors import Vectors

HEADS = ("knn", "logreg")
Probe = Callable[[Float[Tensor, "n dim"]], Int[Tensor, "n"]]  # features to classes, on the CPU


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(LabelledConfig):
    head: str = "knn"  # what recognises: nearest neighbours, or logreg, linear, with C chosen on a holdout
    k: int = 20  # neighbours that vote
    temperature: float = 0.07  # of the votes' softmax
    token: str = "cls"  # what is compared; or mean, of the patch tokens, or several joined by +

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.head, HEADS, "head")
        at_least(1, self, "k")
        if self.temperature <= 0:
            raise UserError(f"temperature={self.temperature}: give more than 0")


def learnt(train: Vectors, bench: Bench, parts: Parts, config: ProbeConfig, work: Path) -> Probe:
    """What these features teach the head; `work` is a folder for what a killed command continues from."""
    if config.head == "logreg":
        model = Search(seed=config.seed).run(train.rows, train.labels, parts, work)[0]
        return lambda rows: model.predict(rows, parts.allowed)

    def vote(rows: Float[Tensor, "n dim"]) -> Int[Tensor, "n"]:
        found = knn_classify(
            train.rows,
            train.labels,
            rows,
            classes=len(parts.classes),
            k=[config.k],
            temperature=config.temperature,
            allowed=parts.allowed,
            device=bench.device,
        )
        return next(iter(found.values())).cpu()

    return vote
