"""Classification by nearest neighbours: no training, nothing to tune (DINO, arXiv 2104.14294, sec. 4)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dinov2.config import at_least, listed
from dinov2.exits import UserError
from dinov2.neighbours import knn_classify
from dinov2.pages import Page
from evals.bench import Bench
from evals.config import LabelledConfig
from evals.data import Labelled, Parts, labelled_parts, per_class_draws
from evals.drawing import draw_classification, draw_neighbours
from evals.per_class import mean_per_class
from evals.results import Outcome
from evals.task import Task

HEADLINE = 20  # the k that DINO reports


@dataclass(frozen=True, kw_only=True)
class KNNConfig(LabelledConfig):
    k: list[int] = listed(10, 20, 100, 200)  # neighbours that vote; left out beyond the training set
    token: str = "cls"  # what is compared; or mean, of the patch tokens, or cls+mean
    temperature: float = 0.07  # of the votes' softmax
    per_class: int | None = None  # training pictures of each class, drawn at random; null: all
    tries: int = 5  # draws over which per_class is averaged

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "tries")
        if not self.k or min(self.k) < 1:
            raise UserError(f"k={self.k}: give one or more numbers from 1 up")
        if self.temperature <= 0:
            raise UserError(f"temperature={self.temperature}: give more than 0")
        if self.per_class is not None:
            at_least(1, self, "per_class")


def run(bench: Bench, parts: Parts, config: KNNConfig, work: Path) -> Outcome:
    """Top-1 accuracy for each k.

    A k larger than the training set is left out; where all are, its size is used. The headline is k = 20 as
    in DINO, or the nearest k that is there: never the best on the test part. `mean_class` is of that k too.
    """
    train_ids, base = _features(bench, parts.train, config)
    test_ids, queries = _features(bench, parts.test, config)
    labels, truth = parts.train.labels(train_ids), parts.test.labels(test_ids)
    answers: dict[int, list[Tensor]] = {}
    for rows in _draws(labels, config):
        found = knn_classify(
            base[rows],
            labels[rows],
            queries,
            classes=len(parts.classes),
            k=config.k,
            temperature=config.temperature,
            allowed=parts.allowed,
            device=bench.device,
        )
        for k, answer in found.items():
            answers.setdefault(k, []).append(answer.cpu())
    scores = {
        f"top1_k{k}": np.mean([(one == truth).numpy() for one in several], axis=0)
        for k, several in answers.items()
    }
    headline = min(answers, key=lambda k: (abs(k - HEADLINE), k))
    mean_class, spread = mean_per_class(scores[f"top1_k{headline}"], truth)

    def draw(page: Page) -> None:
        shown = answers[headline][0]
        draw_classification(page, parts, test_ids, truth, shown)
        draw_neighbours(page, parts, (train_ids, base), (test_ids, queries), truth, shown)

    return Outcome(
        headline=f"top1_k{headline}",
        metrics={name: 100 * float(values.mean()) for name, values in scores.items()}
        | {"mean_class": mean_class},
        scores=scores,
        intervals={"mean_class": spread},
        details={"training_pictures": len(_draws(labels, config)[0]), **parts.details},
        draw=draw,
    )


def _features(bench: Bench, part: Labelled, config: KNNConfig) -> tuple[list[str], Float[Tensor, "n dim"]]:
    ids, vectors = bench.vectors(part.source, config.token)
    return ids, torch.from_numpy(vectors)


def _draws(labels: Int[Tensor, "n"], config: KNNConfig) -> list[Int[Tensor, "kept"]]:
    """The training rows of each try: all of them once, or `per_class` of each class `tries` times."""
    if config.per_class is None:
        return [torch.arange(len(labels))]
    return per_class_draws(labels, config.per_class, config.tries, config.seed)


TASK = Task(KNNConfig, labelled_parts, run, "classification by nearest neighbours")
