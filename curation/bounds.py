"""Between which bounds the numbers among the settings make sense."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dinov2.exits import UserError


@dataclass(frozen=True)
class Bounds:
    """Both ends count. Infinity and nan are never inside."""

    least: float
    most: float = math.inf

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and self.least <= value <= self.most

    def __str__(self) -> str:
        if self.most < math.inf:
            return f"{self.least:.10g} to {self.most:.10g}"
        return f"{self.least:g} or more" if self.least > -math.inf else "a finite number"


ANY = Bounds(-math.inf)
COUNT, COUNT_OR_NONE = Bounds(1), Bounds(0)
SHARE, COSINE = Bounds(0, 1), Bounds(-1, 1)
BITS = Bounds(0, 64)
ABOVE_ZERO = Bounds(1e-6)  # what is divided by
SEED = Bounds(0, 2**32 - 1)

NEAR = {
    "hash_distance": BITS,
    "k": COUNT,
    "cosine": COSINE,
    "always": COUNT_OR_NONE,
    "view_distance": BITS,
    "turned_cosine": COSINE,
    "tilted": COSINE,
    "tilts": COUNT,
    "loosest": SHARE,
    "threshold": SHARE,
}
SET = {
    "k": COUNT,
    "minimum": COSINE,
    "more_than": COUNT_OR_NONE,
    "each": COUNT,
    "cap": COUNT,
}
BOUNDS = {  # by dotted key; NAME stands for every name of the user's own
    "seed": SEED,
    "workers": COUNT_OR_NONE,
    "ingest.piece": COUNT,
    "ingest.small": COUNT_OR_NONE,
    "ingest.blank": Bounds(0, 255),
    "ingest.aspect": Bounds(1),
    "ingest.max_pixels": COUNT,
    "filters.classifiers.NAME.most": SHARE,
    "filters.classifiers.NAME.size": COUNT,
    "filters.classifiers.NAME.mean": ANY,
    "filters.classifiers.NAME.std": ABOVE_ZERO,
    "filters.faces.neighbours": COUNT_OR_NONE,
    "filters.faces.smallest": SHARE,
    "filters.faces.grow": COUNT_OR_NONE,
    "embed.dimension": COUNT,
    "embed.sample": COUNT,
    "embed.copied": COUNT,
    "embed.size": COUNT,
    "embed.batch": COUNT,
    "calibrate.pictures": COUNT_OR_NONE,
    "calibrate.among": COUNT,
    "calibrate.precision": SHARE,
    "calibrate.leaks": SHARE,
    "search.memory_gib": ABOVE_ZERO,
    "search.recall": SHARE,
    "search.floor": SHARE,
    **{f"{section}.{key}": bounds for section in ("duplicates", "leaks") for key, bounds in NEAR.items()},
    "duplicates.split": Bounds(2),
    "duplicates.semdedup.clusters": COUNT,
    "duplicates.semdedup.eps": Bounds(0, 2),
    "clusters.levels": COUNT,
    "clusters.resamplings": COUNT_OR_NONE,
    "clusters.nearest": COUNT,
    "clusters.rounds": COUNT,
    "clusters.memory_gib": ABOVE_ZERO,
    "retrieval.large": COUNT_OR_NONE,
    "retrieval.clusters": COUNT,
    **{
        f"{section}.{key}": bounds
        for section in ("retrieval", "retrieval.sets.NAME")
        for key, bounds in SET.items()
    },
    "budget.pictures": COUNT,
    "budget.retrieved": COUNT_OR_NONE,
    "budget.clustered": COUNT_OR_NONE,
    "write.shard": COUNT,
    "report.cards": COUNT_OR_NONE,
}


def check(config: Any) -> None:
    """A `UserError` for the first number of these settings that is out of its bounds; null never is."""
    for pattern, bounds in BOUNDS.items():
        for key, value in _found(config, pattern):
            numbers = value if isinstance(value, list) else [value]
            wrong = next((one for one in numbers if one is not None and one not in bounds), None)
            if wrong is not None:
                percent = bounds in (SHARE, COSINE) and 1 < wrong <= 100
                hint = f" ({wrong:g} percent is {wrong / 100:g})" if percent else ""
                raise UserError(f"{key}={value}: give {bounds}{hint}")


def _found(owner: Any, pattern: str, before: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of each setting that a pattern means."""
    head, _, rest = pattern.partition(".")
    parts = owner.items() if head == "NAME" else [(head, getattr(owner, head))]
    for name, value in parts:
        if rest:
            yield from _found(value, rest, f"{before}{name}.")
        else:
            yield before + name, value
