"""Labelled pictures in two parts: one to learn from, one to be recognised."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from dinov2.data.sources import Source, open_source
from dinov2.exits import UserError
from evals.config import EvalConfig

TEST_SPLITS = ("val", "test")  # what `data=` takes as the test part, the first that is there


@dataclass(frozen=True)
class Labelled:
    """A source whose every picture has one of `classes`."""

    source: Source
    classes: list[str]

    @cached_property
    def class_of(self) -> dict[str, int]:
        numbers = {name: number for number, name in enumerate(self.classes)}
        names = self.source.labels()
        return {id_: numbers[str(name)] for id_, name in zip(self.source.ids, names, strict=True)}

    @cached_property
    def row_of(self) -> dict[str, int]:
        return {id_: row for row, id_ in enumerate(self.source.ids)}

    def labels(self, ids: Sequence[str]) -> Int[Tensor, "n"]:
        """The classes of these pictures."""
        return torch.tensor([self.class_of[id_] for id_ in ids], dtype=torch.int64)


@dataclass(frozen=True)
class Parts:
    """What a classification task needs; `classes` are those of the training part, sorted."""

    train: Labelled
    test: Labelled

    @property
    def classes(self) -> list[str]:
        return self.train.classes

    @property
    def sources(self) -> dict[str, Source]:
        return {"train": self.train.source, "test": self.test.source}


def labelled_parts(config: EvalConfig) -> Parts:
    """Open `train=` and `test=`, or the two parts of `data=`.

    A test picture of a class that was not learnt cannot be recognised: that is an error, not a miss.

    Raises:
        UserError: a part is missing, empty or unlabelled; both are the same; a test class is unknown; there
            are fewer than two classes.
    """
    train, test = _open(config)
    for source in (train, test):
        _check_labels(source)
    if train.fingerprint == test.fingerprint:
        raise UserError("train and test are the same pictures; name two that share none")
    classes = sorted({str(name) for name in train.labels()})
    if len(classes) < 2:
        raise UserError(
            f"all pictures of {train.name} have the label {classes[0]!r}; give two or more classes"
        )
    unknown = sorted({str(name) for name in test.labels()} - set(classes))
    if unknown:
        listed = ", ".join(unknown[:3]) + (", …" if len(unknown) > 3 else "")
        raise UserError(f"{len(unknown)} classes of {test.name} are not in {train.name}: {listed}")
    return Parts(Labelled(train, classes), Labelled(test, classes))


def _open(config: EvalConfig) -> tuple[Source, Source]:
    cache = Path(config.cache) if config.cache else None
    if config.data is not None:
        if config.train is not None or config.test is not None:
            raise UserError("give data=, or train= and test=, not both")
        return _two_parts(open_source(config.data, cache=cache), config.data)
    if config.train is None or config.test is None:
        raise UserError("give train=… and test=…, or data=ROOT with train/ and val/ (or a split column)")
    return open_source(config.train, cache=cache), open_source(config.test, cache=cache)


def _two_parts(source: Source, spec: str) -> tuple[Source, Source]:
    splits = source.table["split"].to_pylist()
    second = next((name for name in TEST_SPLITS if name in splits), None)
    if "train" not in splits or second is None:
        there = ", ".join(sorted({name for name in splits if name})) or "none"
        raise UserError(f"data={spec} needs a train and a val part, it has {there}; or give train= and test=")
    rows = [[row for row, name in enumerate(splits) if name == part] for part in ("train", second)]
    return source.select(rows[0]), source.select(rows[1])


def _check_labels(source: Source) -> None:
    missing = sum(not name for name in source.labels())
    if missing:
        raise UserError(
            f"{missing:,} of {len(source):,} pictures of {source.name} have no label; put each class into "
            "a folder of its own, or name a list or manifest with a label column"
        )
