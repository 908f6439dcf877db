"""Revisited Oxford and Paris: a folder `jpg/`, and the ground truth file beside it (arXiv 1803.11285).

The ground truth is published as a pickle, `gnd_roxford5k.pkl`: a dict of `imlist` and `qimlist` (names of
pictures without their ending) and `gnd`, a dict for each query with `bbx` (left, top, right, bottom) and rows
of `imlist`, `easy`, `hard` and `junk`. The same as JSON, `gnd_NAME.json`, is read too, so that a set of one's
own needs no pickle.
"""

import io
import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov2.data.sources import Source, open_source
from dinov2.exits import UserError
from evals.layouts.described import Described
from evals.layouts.plain_pickle import load_plain

PATTERNS = ("gnd*.pkl", "gnd*.json")
KINDS = ("easy", "hard", "junk")


@dataclass(frozen=True)
class Query:
    """What a query shows, and which rows of the database show it too, how well."""

    box: tuple[float, float, float, float] | None  # left, top, right, bottom in pixels; None: all of it
    easy: frozenset[int]
    hard: frozenset[int]
    junk: frozenset[int]


@dataclass(frozen=True)
class Revisited:
    """The pictures of both roles, each in the order of the ground truth, and what is to be found."""

    database: Source
    queries: Source
    truth: Sequence[Query]
    described: Described

    @property
    def sources(self) -> dict[str, Any]:
        return {"queries": self.queries, "database": self.database, "ground truth": self.described}


def ground_truth_in(root: Path) -> Path | None:
    """The ground truth file of a folder, if it is such a data set."""
    found = sorted(path for pattern in PATTERNS for path in root.glob(pattern)) if root.is_dir() else []
    if len(found) > 1:
        raise UserError(f"{root} has {len(found)} ground truths; name one: ground_truth={found[0]}")
    return found[0] if found else None


def find(root: Path, ground_truth: Path, cache: Path | None = None) -> Revisited:
    """Open the data set.

    Raises:
        UserError: the ground truth is no such file, or a picture that it names is missing.
    """
    images = next((root / name for name in ("jpg", "images") if (root / name).is_dir()), root)
    source = open_source(str(images), cache=cache)
    content = _content(ground_truth)
    rows = _Rows(source, ground_truth)
    try:
        database = source.select([rows.of(name) for name in content["imlist"]])
        queries = source.select([rows.of(name) for name in content["qimlist"]])
        truth = [_query(one, len(database)) for one in content["gnd"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{ground_truth} lacks a sound imlist, qimlist or gnd: {error!r}") from None
    if len(truth) != len(queries):
        raise UserError(f"{ground_truth} has {len(queries)} queries, and {len(truth)} in gnd")
    return Revisited(database, queries, truth, Described.file(ground_truth, len(truth)))


class _Rows:
    """Rows of a source by their file's name without folder and ending."""

    def __init__(self, source: Source, named_by: Path) -> None:
        self.source, self.named_by = source, named_by
        self.rows: dict[str, int] = {}
        for row, uri in enumerate(source.table["uri"].to_pylist()):
            if self.rows.setdefault(Path(uri).stem, row) != row:
                raise UserError(f"two pictures of {source.name} are called {Path(uri).stem}")

    def of(self, name: str) -> int:
        if name not in self.rows and Path(name).stem not in self.rows:
            raise UserError(f"{self.named_by} names a picture {name} that {self.source.name} does not have")
        return self.rows.get(name, self.rows.get(Path(name).stem, 0))


def _content(path: Path) -> Any:
    try:
        data = path.read_bytes()
        return json.loads(data) if path.suffix == ".json" else load_plain(io.BytesIO(data))
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _query(one: dict[str, Any], pictures: int) -> Query:
    box = one.get("bbx")
    rows = {kind: frozenset(map(int, one.get(kind, ()))) for kind in KINDS}
    if any(not 0 <= row < pictures for kind in rows.values() for row in kind):
        raise ValueError(f"a row beyond the {pictures} of imlist")
    left, top, right, bottom = map(float, box) if box is not None else (0.0, 0.0, 0.0, 0.0)
    if box is not None and (left >= right or top >= bottom):
        raise ValueError(f"a box of no size, {list(box)}")
    return Query(
        None if box is None else (left, top, right, bottom), rows["easy"], rows["hard"], rows["junk"]
    )
