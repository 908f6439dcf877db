"""One run of curation: its settings, its folder, its sources, and what its stages leave for one another."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from curation.config import CurateConfig
from curation.pieces import Workers
from dinov2.data.manifest import EDGES_SCHEMA, write_format
from dinov2.data.sources import Source, open_source
from dinov2.exits import UserError
from dinov2.files import read_json, write_json, write_table

DROPPED_SCHEMA = pa.schema(
    {"id": pa.large_string(), "evidence": pa.large_string(), "similarity": pa.float32(), "error": pa.string()}
)


@dataclass(frozen=True)
class Run:
    """What a stage is given. Its files go to `stages/NAME/`, its edges to `edges/KIND.parquet`."""

    config: CurateConfig
    folder: Path
    workers: Workers

    def stage(self, name: str) -> Path:
        return self.folder / "stages" / name

    def done(self, name: str) -> dict[str, Any] | None:
        """The counts a finished stage left, or None."""
        path = self.stage(name) / "done.json"
        return read_json(path) if path.exists() else None

    def finish(self, name: str, counts: dict[str, Any]) -> None:
        write_json(self.stage(name) / "done.json", counts)

    @cached_property
    def sets(self) -> dict[str, Source]:
        """The sources by role (pool, and seeds and holdout where given), each sorted by id."""
        specs = {"pool": self.config.pool, "seeds": self.config.seeds, "holdout": self.config.holdout}
        cache = self.config.cache
        return {
            role: _sorted(open_source(spec, cache=cache)) for role, spec in specs.items() if spec is not None
        }

    def check_sources(self) -> None:
        """A folder belongs to its sources as they were.

        Raises:
            UserError: a source has changed since the folder was begun.
        """
        for role, source in self.sets.items():
            path = self.stage("ingest") / role / "source.json"
            now = {"fingerprint": source.fingerprint, "pictures": len(source)}
            if not path.exists():
                write_json(path, now)
            elif (before := read_json(path)) != now:
                raise UserError(
                    f"{role}={getattr(self.config, role)} has changed since {self.folder} was begun "
                    f"({before['pictures']} pictures then, {now['pictures']} now); name another output folder"
                )

    def drop(self, stage: str, rows: dict[str, list[Any]]) -> None:
        """Record what a stage drops: columns of DROPPED_SCHEMA, missing ones are null."""
        count = len(rows["id"])
        full = {name: rows.get(name, [None] * count) for name in DROPPED_SCHEMA.names}
        table = pa.table(full, schema=DROPPED_SCHEMA)
        write_table(self.stage(stage) / "dropped.parquet", table.take(pc.sort_indices(table["id"])))

    def dropped(self, stage: str) -> pa.Table:
        path = self.stage(stage) / "dropped.parquet"
        return parquet.read_table(path) if path.exists() else DROPPED_SCHEMA.empty_table()

    def kept(self, ids: pa.Array, before: list[str]) -> np.ndarray:
        """[n] bool: which of `ids` none of these stages has dropped."""
        gone = pa.concat_tables([self.dropped(stage) for stage in before])["id"].combine_chunks()
        return ~pc.is_in(ids, value_set=gone).to_numpy(zero_copy_only=False)

    def write_edges(self, kind: str, a: pa.Array, b: pa.Array, similarity: np.ndarray) -> None:
        table = pa.table({"a": a, "b": b, "similarity": similarity, "kind": [kind] * len(similarity)})
        table = table.take(pc.sort_indices(table, [("a", "ascending"), ("b", "ascending")]))
        write_format(self.folder / "edges" / f"{kind}.parquet", table, EDGES_SCHEMA)


def _sorted(source: Source) -> Source:
    return source.select(pc.sort_indices(source.table["id"]).to_numpy())
