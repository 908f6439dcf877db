"""Features of labelled pictures in memory, as the classifiers take them."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from evals.bench import Bench
from evals.data import Labelled


@dataclass(frozen=True)
class Vectors:
    """A row for each readable picture of a part."""

    ids: list[str]
    rows: Float[Tensor, "n dim"]
    labels: Int[Tensor, "n"]

    def __len__(self) -> int:
        return len(self.ids)

    def where(self, chosen: Bool[Tensor, "n"]) -> "Vectors":
        """Some of the rows."""
        ids = [id_ for id_, one in zip(self.ids, chosen.tolist(), strict=True) if one]
        return Vectors(ids, self.rows[chosen], self.labels[chosen])


def vectors_of(bench: Bench, part: Labelled, token: str, size: int | None = None) -> Vectors:
    """Features of this token in float32; `size` is in pixels, and the settings' own by default."""
    ids, rows = bench.vectors(part.source, token, size)
    return Vectors(ids, torch.from_numpy(rows).float(), part.labels(ids))
