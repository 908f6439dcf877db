"""What the demo's folder holds once the stages have run, read from the files that they left."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from demo.inputs import Inputs, read_inputs
from dinov2.data.decode import Unreadable
from dinov2.data.manifest import DECISIONS_SCHEMA, EDGES_SCHEMA, read_format
from dinov2.data.sources import Source, open_source
from dinov2.files import read_json


@dataclass(frozen=True)
class Made:
    """The output folder of one demo."""

    folder: Path

    @cached_property
    def inputs(self) -> Inputs:
        return read_inputs(self.folder)

    @property
    def curated(self) -> Path:
        return self.folder / "curated"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @cached_property
    def seed(self) -> int:
        return yaml.safe_load((self.folder / "config.yaml").read_text())["seed"]

    @cached_property
    def sources(self) -> dict[str, Source]:
        """The pictures by role: pool, test, and seeds where there are any."""
        roles = {"pool": self.inputs.pool, "test": self.inputs.test, "seeds": self.inputs.seeds}
        return {role: open_source(spec) for role, spec in roles.items() if spec is not None}

    @cached_property
    def places(self) -> dict[str, tuple[str, int]]:
        """Role and row of every picture by its id."""
        return {
            id_: (role, row) for role, source in self.sources.items() for row, id_ in enumerate(source.ids)
        }

    def bytes_of(self, id_: str) -> bytes:
        """A picture's file; nothing where it cannot be read, which a gallery shows as such."""
        role, row = self.places[id_]
        try:
            return self.sources[role].read(row)
        except Unreadable:
            return b""

    @cached_property
    def decisions(self) -> list[dict[str, Any]]:
        return read_format(self.curated / "decisions.parquet", DECISIONS_SCHEMA).to_pylist()

    def edges(self, kind: str) -> list[dict[str, Any]]:
        path = self.curated / "edges" / f"{kind}.parquet"
        return read_format(path, EDGES_SCHEMA).to_pylist() if path.exists() else []

    @cached_property
    def versions(self) -> dict[str, Any]:
        return read_json(self.run / "versions.json")


def spread(items: list[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly from first to last, so that nobody has picked them."""
    if len(items) <= count:
        return items
    step = (len(items) - 1) / max(1, count - 1)
    return [items[round(place * step)] for place in range(count)]
