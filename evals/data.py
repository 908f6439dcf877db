"""Labelled pictures in two parts: one to learn from, one to be recognised."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dinov2.data.order import derive_seed
from dinov2.data.sources import Source
from dinov2.exits import UserError
from evals.classes import NUMBERS, ClassMap, class_map, renamed
from evals.config import EvalConfig, LabelledConfig
from evals.layouts.labelled import open_labelled

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
    """What a classification task needs; `classes` are those of the training part, sorted.

    Attributes:
        allowed: which of the classes may be answered.
        class_map: what the test part's classes were renamed by.
        left_out: test pictures of classes that were not learnt, where those are left out.
    """

    train: Labelled
    test: Labelled
    allowed: Bool[Tensor, "classes"]
    class_map: ClassMap | None = None
    left_out: int = 0

    @property
    def classes(self) -> list[str]:
        return self.train.classes

    @property
    def sources(self) -> Mapping[str, Source | ClassMap]:
        named = {"class map": self.class_map} if self.class_map is not None else {}
        return {"train": self.train.source, "test": self.test.source, **named}

    @property
    def details(self) -> dict[str, int]:
        """What a result says of the classes."""
        return {"classes": int(self.allowed.sum()), "left_out": self.left_out}


def labelled_parts(config: EvalConfig) -> Parts:
    """Open `train=` and `test=`, or the two parts of `data=`.

    A test picture of a class that was not learnt cannot be recognised: that is an error, not a miss, unless
    `classes=intersect` leaves such pictures out.

    Raises:
        UserError: a part is missing, empty or unlabelled; both are the same; a test class is unknown; there
            are fewer than two classes.
    """
    asked = config if isinstance(config, LabelledConfig) else None
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
    mapped = class_map(asked.class_map, classes) if asked and asked.class_map else None
    if mapped is not None:
        test = renamed(test, mapped.names)
    learnt = Labelled(train, classes)
    if asked is None or asked.classes == "train":
        _check_known(test, learnt)
        return Parts(learnt, Labelled(test, classes), torch.ones(len(classes), dtype=torch.bool), mapped)
    return _intersected(learnt, test, mapped)


def held_out(labels: Int[Tensor, "n"], share: float, seed: int, classes: Sequence[str]) -> Bool[Tensor, "n"]:
    """A share of the rows of each class, drawn at random: at least one, except of a class that has only one.

    Raises:
        UserError: the share leaves a class nothing to learn from.
    """
    generator = torch.Generator().manual_seed(derive_seed("holdout", seed))
    held = torch.zeros(len(labels), dtype=torch.bool)
    for name in labels.unique():
        rows = (labels == name).nonzero()[:, 0]
        count = round(share * len(rows)) or int(len(rows) > 1)
        if count == len(rows):
            raise UserError(f"holdout={share} leaves no picture of {classes[int(name)]} to train on")
        held[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    return held


def per_class_draws(
    labels: Int[Tensor, "n"], per_class: int, tries: int, seed: int
) -> list[Int[Tensor, "kept"]]:
    """The rows of each try: `per_class` of each class, drawn at random, ascending."""
    counts = labels.bincount()
    if int(counts[counts > 0].min()) < per_class:
        raise UserError(f"per_class={per_class}: the smallest class has {int(counts[counts > 0].min())}")
    draws = []
    for number in range(tries):
        generator = torch.Generator().manual_seed(derive_seed("per class", seed, number))
        order = torch.randperm(len(labels), generator=generator)
        by_class = [order[labels[order] == name][:per_class] for name in labels.unique()]
        draws.append(torch.cat(by_class).sort().values)
    return draws


def _check_known(test: Source, learnt: Labelled) -> None:
    unknown = sorted({str(name) for name in test.labels()} - set(learnt.classes))
    if not unknown:
        return
    listed = ", ".join(unknown[:3]) + (", …" if len(unknown) > 3 else "")
    numbers = all(name.isdecimal() for name in unknown)
    hint = f"; class_map={NUMBERS} takes them for places in the sorted list of those" if numbers else ""
    raise UserError(
        f"{len(unknown)} classes of the test part, {test.name}, are not in the training part, "
        f"{learnt.source.name}: {listed}{hint}"
    )


def _intersected(learnt: Labelled, test: Source, mapped: ClassMap | None) -> Parts:
    """The test pictures of classes that were learnt; the classes that they have are those to be answered."""
    there = {str(name) for name in test.labels()}
    allowed = torch.tensor([name in there for name in learnt.classes])
    if int(allowed.sum()) < 2:
        raise UserError(
            f"{test.name} and {learnt.source.name} share {int(allowed.sum())} classes; two or more are needed"
        )
    known = set(learnt.classes)
    rows = np.array([row for row, name in enumerate(test.labels()) if name in known], dtype=np.int64)
    left_out = len(test) - len(rows)
    test = test.select(rows) if left_out else test
    return Parts(learnt, Labelled(test, learnt.classes), allowed, mapped, left_out)


def _open(config: EvalConfig) -> tuple[Source, Source]:
    cache = Path(config.cache) if config.cache else None
    if config.data is not None:
        if config.train is not None or config.test is not None:
            raise UserError("give data=, or train= and test=, not both")
        return _two_parts(open_labelled(config.data, cache), config.data)
    if config.train is None or config.test is None:
        raise UserError("give train=… and test=…, or data=ROOT with train/ and val/ (or a split column)")
    return open_labelled(config.train, cache), open_labelled(config.test, cache)


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
