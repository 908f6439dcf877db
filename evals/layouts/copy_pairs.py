"""Queries, references and a table of which query is a copy of which reference, as DISC21 publishes them.

`ground_truth.csv` has the columns query_id and reference_id, the names of pictures without their ending. A
query without a reference_id, or one that the table does not name, is a copy of nothing (arXiv 2106.09672).
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov2.data.sources import Source
from dinov2.exits import UserError
from evals.layouts.described import Described

COLUMNS = ("query_id", "reference_id")


@dataclass(frozen=True)
class CopyPairs:
    """Attributes:
    wanted: for each query the rows of the references that it is a copy of.
    """

    queries: Source
    references: Source
    wanted: Sequence[frozenset[int]]
    described: Described

    @property
    def sources(self) -> dict[str, Any]:
        return {"queries": self.queries, "references": self.references, "ground truth": self.described}


def find(queries: Source, references: Source, ground_truth: Path) -> CopyPairs:
    """Match the table with the pictures.

    Raises:
        UserError: the table lacks a column, names a picture that is not there, or names no pair at all.
    """
    rows = {name: _rows(source) for name, source in zip(COLUMNS, (queries, references), strict=True)}
    wanted: list[set[int]] = [set() for _ in range(len(queries))]
    count = 0
    for pair in _pairs(ground_truth):
        if not pair["reference_id"]:
            continue
        found = []
        for name, source in zip(COLUMNS, (queries, references), strict=True):
            if pair[name] not in rows[name]:
                raise UserError(f"{ground_truth} names {pair[name]}, which is not in {source.name}")
            found.append(rows[name][pair[name]])
        wanted[found[0]].add(found[1])
        count += 1
    if not count:
        raise UserError(f"{ground_truth} names no copy")
    return CopyPairs(queries, references, [*map(frozenset, wanted)], Described.file(ground_truth, count))


def _pairs(path: Path) -> list[dict[str, str]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not set(COLUMNS) <= set(reader.fieldnames or ()):
                raise UserError(f"{path} needs the columns query_id and reference_id")
            return [{name: (row[name] or "").strip() for name in COLUMNS} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _rows(source: Source) -> dict[str, int]:
    return {Path(uri).stem: row for row, uri in enumerate(source.table["uri"].to_pylist())}
