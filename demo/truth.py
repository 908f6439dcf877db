"""Holds curation's decisions against what was planted."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import parquet

from dinov2.data.manifest import DECISIONS_SCHEMA, read_format
from dinov2.data.sources import open_source

COPY_STAGES = ("ingest", "duplicates", "holdout")  # what these drop is said to be broken, a copy, or a leak
ORIGINAL = "original"


@dataclass(frozen=True)
class Tally:
    """How many of one planted kind there were, and how many were found."""

    planted: int
    found: int
    missed: list[str]  # paths

    @property
    def percent(self) -> float:
        return 100.0 * self.found / self.planted if self.planted else 0.0


@dataclass(frozen=True)
class WrongDrop:
    """An original that was dropped though it is a copy of nothing."""

    path: str
    stage: str
    lost_to: str | None  # path
    similarity: float | None


@dataclass(frozen=True)
class Verdict:
    """Everything the page says of curation against the truth."""

    planted: dict[str, Tally]  # by kind
    originals: int  # in the pool
    wrong: list[WrongDrop]
    kept: Counter[str]  # what stays in the end: "wanted", "unwanted" and "drawing" originals, and "copy"
    offered: Counter[str]  # the same in the pool


class Decisions:
    """Decisions by path below the pictures' folder: who stays, and whom the others lost to."""

    def __init__(self, rows: Iterable[dict[str, Any]], paths: dict[str, str]) -> None:
        """`paths`: of every id in the pool and the holdout."""
        self.paths = paths
        self.rows = {paths[row["id"]]: row for row in rows}

    @classmethod
    def read(cls, curated: Path, pool: str, test: str) -> "Decisions":
        sources = [open_source(pool), open_source(test)]
        paths = {
            id_: f"{folder}/{uri}"
            for folder, source in zip(("pool", "test"), sources, strict=True)
            for id_, uri in zip(source.ids, source.table["uri"].to_pylist(), strict=True)
        }
        return cls(read_format(curated / "decisions.parquet", DECISIONS_SCHEMA).to_pylist(), paths)

    def gone(self, path: str) -> bool:
        """Whether it was dropped as broken, a copy or a leak; not for want of a seed that asks for it."""
        return path in self.rows and self.rows[path]["dropped_by"] in COPY_STAGES

    def survivor(self, path: str) -> str | None:
        """Who stays in its place: itself, whom it lost to, or whom that one lost to. A broken file: None."""
        while self.gone(path):
            evidence = self.rows[path]["evidence"]
            if evidence is None:
                return None
            path = self.paths[evidence]
        return path


def judge(truth: Iterable[dict[str, Any]], decisions: Decisions) -> Verdict:
    """Compare with the truth.

    A copy is found if it and its original come down to the same survivor, a leak if that is its test
    picture, a broken file if it was recorded as one. An original is dropped wrongly if who stays in its place
    is not one of its own copies.
    """
    rows = {row["path"]: row for row in truth}
    root = {path: row["of"] or path for path, row in rows.items()}
    pool = {path: row for path, row in rows.items() if path in decisions.rows}
    found: dict[str, dict[str, bool]] = {}
    for path, row in pool.items():
        if row["kind"] == "corrupt":
            found.setdefault(row["kind"], {})[path] = decisions.rows[path]["error"] is not None
        elif row["of"] is not None:
            same = decisions.survivor(path) == decisions.survivor(row["of"])
            found.setdefault(row["kind"], {})[path] = same
    originals = [path for path, row in pool.items() if row["kind"] == ORIGINAL]
    wrong = []
    for path in originals:
        survivor = decisions.survivor(path)
        if survivor is None or root[survivor] != path:
            wrong.append(_wrong(decisions, path))
    kept = [path for path in pool if decisions.rows[path]["kept"]]
    return Verdict(
        planted={
            kind: Tally(len(each), sum(each.values()), [path for path, yes in each.items() if not yes])
            for kind, each in found.items()
        },
        originals=len(originals),
        wrong=wrong,
        kept=Counter(_sort(rows[path]) for path in kept),
        offered=Counter(_sort(row) for row in pool.values()),
    )


def read_truth(path: Path | str) -> list[dict[str, Any]]:
    return parquet.read_table(path).to_pylist()


def _wrong(decisions: Decisions, path: str) -> WrongDrop:
    row = decisions.rows[path]
    lost_to = decisions.paths[row["evidence"]] if row["evidence"] else None
    return WrongDrop(path, row["dropped_by"], lost_to, row["similarity"])


def _sort(row: dict[str, Any]) -> str:
    if row["kind"] == "drawing":
        return "drawing"
    if row["kind"] != ORIGINAL:
        return "copy"
    return "wanted" if row["wanted"] else "unwanted"
