"""The k-NN vote that training and evaluation share."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dinov2.neighbours.exact import nearest
from dinov2.neighbours.rows import Normalised, Rows


@torch.no_grad()
def knn_classify(
    train: Rows,
    train_labels: Int[Tensor, "train"],
    test: Rows,
    *,
    classes: int,
    k: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    allowed: Bool[Tensor, "classes"] | None = None,
    backend: str = "auto",
    device: torch.device | str | None = None,
) -> dict[int, Int[Tensor, "test"]]:
    """The class that each test row's k nearest training rows vote for, a vote weighing exp(cosine / T).

    One search for the largest k answers all of them. (DINO, arXiv 2104.14294, sec. 3 and 4: weighted k-NN.)

    Args:
        train, test: features [n, dim]; normalised here.
        train_labels: in [0, classes).
        k: those larger than the training set are left out; if all are, its size takes their place.
        allowed: the classes that may be answered; votes for others do not count. None: all.

    Returns:
        for each k the classes, int64 [test], on `device`. Equal votes go to the lower class.
    """
    if len(train_labels) != len(train):
        raise ValueError(f"{len(train_labels)} labels for {len(train)} training rows")
    kept = sorted({size for size in k if size <= len(train)}) or [len(train)]
    train, test = Normalised(train), Normalised(test)
    similarity, index = nearest(test, train, kept[-1], backend=backend, device=device)
    labels = train_labels.to(index.device)[index]
    weights = (similarity.double() / temperature).exp()
    answers = {size: torch.empty(len(test), dtype=torch.int64, device=index.device) for size in kept}
    barred = None if allowed is None or bool(allowed.all()) else ~allowed.to(index.device)
    rows = max(1, 2**25 // classes)
    for start in range(0, len(test), rows):
        part = slice(start, start + rows)
        votes = weights.new_zeros(len(weights[part]), classes)
        for last, size in zip([0, *kept], kept, strict=False):
            votes.scatter_add_(1, labels[part, last:size], weights[part, last:size])
            counted = votes if barred is None else votes.masked_fill(barred, -1)  # below no vote at all
            answers[size][part] = counted.argmax(1)
    return answers
