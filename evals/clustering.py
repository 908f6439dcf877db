"""Clusters without labels: k-means on features, held against the classes.

The centroids are those of the training part, or of the test part itself; the test pictures are scored. A
cluster stands for at most one class, by the assignment that makes the most pictures right (Hungarian method);
NMI is normalised by the arithmetic mean, ARI is adjusted for chance (Hubert and Arabie 1985).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from dinov2.config import at_least, one_of
from dinov2.data.order import derive_seed
from dinov2.exits import UserError
from dinov2.pages import Page
from evals.bench import Bench
from evals.bootstrap import of_statistic
from evals.config import LabelledConfig
from evals.data import Parts, labelled_parts
from evals.drawing import draw_classification, draw_examples
from evals.results import Outcome
from evals.task import Task
from evals.vectors import vectors_of

FITTED_ON = ("train", "test")


@dataclass(frozen=True, kw_only=True)
class ClusteringConfig(LabelledConfig):
    clusters: int | None = None  # null: as many as there are classes
    fit: str = "train"  # the part whose features the centroids are of; or test
    token: str = "cls"  # what is clustered; or mean, of the patch tokens, or several joined by +
    normalised: bool = True  # cluster features of length 1
    restarts: int = 5  # of k-means; the tightest is kept

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "restarts")
        one_of(self.fit, FITTED_ON, "fit")
        if self.clusters is not None:
            at_least(2, self, "clusters")


def run(bench: Bench, parts: Parts, config: ClusteringConfig, work: Path) -> Outcome:
    """Accuracy by matching, NMI and ARI of the test pictures' clusters, all in percent."""
    test = vectors_of(bench, parts.test, config.token)
    fit = test if config.fit == "test" else vectors_of(bench, parts.train, config.token)
    count = config.clusters or int(parts.allowed.sum())
    if count > len(fit):
        raise UserError(f"{len(fit)} pictures cannot make {count} clusters; give clusters= a smaller number")
    with bench.timed("training"):
        cluster = _clusters(fit.rows, test.rows, count, config)
    counts = contingency(test.labels.numpy(), cluster, len(parts.classes), count)
    matched = matching(counts)
    answer = torch.from_numpy(matched)[torch.from_numpy(cluster)]
    right = (answer == test.labels).double().numpy()

    def of_draw(figure: str) -> tuple[float, float]:
        pairs = test.labels.numpy() * count + cluster

        def drawn(times: NDArray[np.int64]) -> float:
            table = np.bincount(pairs, weights=times, minlength=counts.size).reshape(counts.shape)
            return FIGURES[figure](table)

        return of_statistic(drawn, len(test), around=FIGURES[figure](counts))

    def draw(page: Page) -> None:
        page.heading("Clusters")
        page.table(["cluster", "stands for", "pictures", "right"], _rows(counts, matched, parts.classes))
        some = test.where(answer >= 0)  # clusters that stand for nothing have no confusions
        draw_classification(page, parts, some.ids, some.labels, answer[answer >= 0])
        draw_examples(page, parts, some.ids, some.labels, answer[answer >= 0])

    return Outcome(
        headline="accuracy",
        metrics={"accuracy": 100 * float(right.mean())} | {name: of(counts) for name, of in FIGURES.items()},
        scores={"accuracy": right},
        intervals={name: of_draw(name) for name in FIGURES},
        details={"clusters": count, **parts.details},
        draw=draw,
    )


def contingency(truth: NDArray, cluster: NDArray, classes: int, clusters: int) -> NDArray[np.int64]:
    """How many pictures each class has in each cluster, [classes, clusters]."""
    return np.bincount(truth * clusters + cluster, minlength=classes * clusters).reshape(classes, clusters)


def matching(counts: NDArray[np.number]) -> NDArray[np.int64]:
    """The class that each cluster stands for, -1 for none: one to one, and the most pictures right."""
    from scipy.optimize import linear_sum_assignment

    found = np.full(counts.shape[1], -1, dtype=np.int64)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    found[columns] = rows
    return found


def mutual_information(counts: NDArray[np.number]) -> float:
    """Normalised mutual information of classes and clusters in percent; 100 where both have but one member.

    Over the arithmetic mean of the two entropies.
    """
    share = counts / counts.sum()
    of_class, of_cluster = share.sum(1), share.sum(0)
    entropies = _entropy(of_class), _entropy(of_cluster)
    if entropies[0] == entropies[1] == 0:
        return 100.0
    both = entropies[0] + entropies[1] - _entropy(share.ravel())
    return max(0.0, 100 * float(2 * both / sum(entropies)))


def adjusted_rand(counts: NDArray[np.number]) -> float:
    """Adjusted Rand index in percent: pairs that classes and clusters agree on, beyond chance."""
    total = float(counts.sum())
    together = float((counts * (counts - 1)).sum()) / 2
    of_class, of_cluster = (float((sums * (sums - 1)).sum()) / 2 for sums in (counts.sum(1), counts.sum(0)))
    chance = of_class * of_cluster / max(total * (total - 1) / 2, 1.0)
    most = (of_class + of_cluster) / 2
    return 100.0 if most == chance else 100 * (together - chance) / (most - chance)


FIGURES = {"nmi": mutual_information, "ari": adjusted_rand}


def _clusters(
    fit: Float[Tensor, "m dim"], test: Float[Tensor, "n dim"], count: int, config: ClusteringConfig
) -> NDArray[np.int64]:
    """The cluster of each test row."""
    from sklearn.cluster import KMeans

    if config.normalised:
        fit, test = normalize(fit, dim=1), normalize(test, dim=1)
    seed = derive_seed("clusters", config.seed) % 2**32
    model = KMeans(count, n_init=config.restarts, random_state=seed).fit(fit.numpy())  # pyright: ignore[reportArgumentType]  # its annotation names only "auto"
    return np.asarray(model.predict(test.numpy()), dtype=np.int64)


def _entropy(shares: NDArray[np.floating]) -> float:
    some = shares[shares > 0]
    return float(-(some * np.log(some)).sum())


def _rows(counts: Int[NDArray, "classes clusters"], matched: NDArray, classes: list[str]) -> list[list]:
    return [
        [cluster, classes[name] if name >= 0 else "nothing", int(counts[:, cluster].sum()), right]
        for cluster, name in enumerate(matched.tolist())
        for right in [int(counts[name, cluster]) if name >= 0 else 0]
    ]


TASK = Task(ClusteringConfig, labelled_parts, run, "k-means against the classes")
