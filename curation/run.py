"""One run of curation: its settings, its folder, its sources, and what its stages leave for one another.

A stage belongs to what it and the stages before it were told: the settings (`curation.config.TOLD`) and the
pictures of the sources. `stages/NAME/begun.json` holds the hash of that. Where it is another one, the stage
begins anew; only what it searched for stays, if that was told the same.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from curation.config import ALSO, DECIDING, READ, READ_BY, TOLD, CurateConfig, stage_of
from curation.pieces import Workers
from curation.shares import Share
from curation.taken import taken
from dinov2.config import identity
from dinov2.data.manifest import EDGES_SCHEMA, write_format
from dinov2.data.sources import Source, open_source
from dinov2.exits import UserError
from dinov2.files import read_json, write_json, write_table

DROPPED_SCHEMA = pa.schema(
    {"id": pa.large_string(), "evidence": pa.large_string(), "similarity": pa.float32(), "error": pa.string()}
)
# In a stage's folder: what it read or searched for, before it decided.
SEARCHED = ("pool", "seeds", "holdout", "copies", "search", "candidates.parquet", "aligned", "originals")
ROLES = ("pool", "seeds", "holdout", "as_is")
SOURCES = "sources.json"  # in stages/: the sources' fingerprints
BEFORE = "stages.before"  # the stages of the pictures that were there before the sources changed
LEFT = {  # what a stage leaves outside its own folder
    "duplicates": ("edges/duplicate.parquet",),
    "holdout": ("edges/holdout.parquet", "leaks.parquet"),
    "clusters": ("clusters.parquet",),
    "retrieval": ("edges/retrieval.parquet",),
    "write": ("decisions.parquet", "manifest.parquet", "shards"),
    "report": ("report.html", "report"),
}


@dataclass(frozen=True)
class Run:
    """What a stage is given. Its files go to `stages/NAME/`, its edges to `edges/KIND.parquet`."""

    config: CurateConfig
    folder: Path
    workers: Workers
    share: Share = field(default_factory=Share)

    def stage(self, name: str) -> Path:
        return self.folder / "stages" / name

    def done(self, name: str) -> dict[str, Any] | None:
        """The counts a finished stage left, or None. What was told otherwise does not count as finished."""
        path = self.stage(name) / "done.json"
        same = self._told(name)["told"] == self._begun(name).get("told")
        return read_json(path) if path.exists() and same else None

    def begin(self, name: str) -> None:
        """Make room for a stage: what it left when it was told otherwise goes."""
        told, folder = self._told(name), self.stage(name)
        before = self._begun(name)
        if before != told:
            stays = SEARCHED if before.get("searched") == told["searched"] else ()
            (folder / "begun.json").unlink(missing_ok=True)  # first: what is half gone belongs to nobody
            for path in sorted(folder.iterdir()) if folder.is_dir() else []:
                if path.name not in stays:
                    _remove(path)
            for left in LEFT.get(name, ()):
                _remove(self.folder / left)
        write_json(folder / "begun.json", told)
        (folder / "done.json").unlink(missing_ok=True)

    def finish(self, name: str, counts: dict[str, Any]) -> None:
        write_json(self.stage(name) / "done.json", counts)

    def _begun(self, name: str) -> dict[str, str]:
        path = self.stage(name) / "begun.json"
        return read_json(path) if path.exists() else {}

    def _told(self, name: str) -> dict[str, str]:
        """Hashes of all that a stage is told, of what its search is told, and of the stage's own settings."""
        stages = list(TOLD)
        known, also = stages[: stages.index(name) + 1], ALSO.get(name, ())
        settings = {
            key: value
            for key, value in identity(self.config).items()
            if stage_of(key) in known or key in also
        }
        searching = {
            key: value
            for key, value in settings.items()
            if (stage_of(key) in READ_BY.get(name, READ) and stage_of(key) != name)
            or ((stage_of(key) == name or key in also) and key.rpartition(".")[2] not in DECIDING)
        }
        own = {key: value for key, value in settings.items() if stage_of(key) == name and key not in ROLES}
        return {"told": self._hash(settings), "searched": self._hash(searching), "own": _hash(own)}

    def _hash(self, settings: dict[str, Any]) -> str:
        return _hash([settings, self._pictures])

    @cached_property
    def _pictures(self) -> dict[str, Any]:
        return {
            role: {"fingerprint": source.fingerprint, "pictures": len(source)}
            for role, source in self.sets.items()
        }

    @cached_property
    def sets(self) -> dict[str, Source]:
        """The sources by role (pool, and seeds and holdout where given), each sorted by id.

        What is named `as_is` is a part of the pool.
        """
        config = self.config
        pool = config.pool if config.as_is is None else f"{config.pool},{config.as_is}"
        specs = {"pool": pool, "seeds": config.seeds, "holdout": config.holdout}
        return {
            role: _sorted(open_source(spec, cache=config.cache))
            for role, spec in specs.items()
            if spec is not None
        }

    @cached_property
    def _as_is(self) -> pa.Array:
        """Ids of the pictures that stay as they are."""
        if self.config.as_is is None:
            return pa.array([], pa.large_string())
        return open_source(self.config.as_is, cache=self.config.cache).table["id"].combine_chunks()

    def as_is(self, ids: pa.Array) -> np.ndarray:
        """[n] bool: which of `ids` came from `as_is=`."""
        return pc.is_in(ids, value_set=self._as_is).to_numpy(zero_copy_only=False)

    def check_sources(self) -> None:
        """A folder belongs to its sources as they were, unless it is run again from its first stage.

        Raises:
            UserError: a source has changed since the folder was begun.
        """
        path = self.stage(SOURCES)
        before = read_json(path) if path.exists() else {}
        changed = [role for role, now in self._pictures.items() if before.get(role, now) != now]
        if changed and self.config.from_stage != "ingest":
            role = changed[0]
            raise UserError(
                f"{role}={getattr(self.config, role)} has changed since {self.folder} was begun "
                f"({before[role]['pictures']} pictures then, {self._pictures[role]['pictures']} now); add "
                "from_stage=ingest to take that up, or name another output folder"
            )
        if before and before != self._pictures and not (self.folder / BEFORE).exists():
            path.parent.rename(self.folder / BEFORE)
        if before != self._pictures or not path.exists():
            write_json(path, self._pictures)

    def before(self, name: str) -> Path | None:
        """The folder of a stage as it was before the sources changed, if it was told the same settings."""
        folder = self.folder / BEFORE / name
        path = folder / "begun.json"
        same = path.exists() and read_json(path)["own"] == self._told(name)["own"]
        return folder if same else None

    def forget_before(self) -> None:
        """Nothing more is taken over from before the sources changed."""
        _remove(self.folder / BEFORE)

    def drop(self, stage: str, rows: dict[str, list[Any]]) -> None:
        """Record what a stage drops: columns of DROPPED_SCHEMA, missing ones are null."""
        count = len(rows["id"])
        full = {name: rows.get(name, [None] * count) for name in DROPPED_SCHEMA.names}
        table = pa.table(full, schema=DROPPED_SCHEMA)
        write_table(self.stage(stage) / "dropped.parquet", table.take(pc.sort_indices(table["id"])))

    def dropped(self, stage: str) -> pa.Table:
        """What a stage dropped, or what was taken out by hand ("takedown")."""
        if stage == "takedown":
            ids = taken(self.folder)["id"]
            return pa.table(
                {
                    name: ids if name == "id" else pa.nulls(len(ids), DROPPED_SCHEMA.field(name).type)
                    for name in DROPPED_SCHEMA.names
                },
                schema=DROPPED_SCHEMA,
            )
        path = self.stage(stage) / "dropped.parquet"
        return parquet.read_table(path) if path.exists() else DROPPED_SCHEMA.empty_table()

    def kept(self, ids: pa.Array, before: list[str]) -> np.ndarray:
        """[n] bool: which of `ids` none of these stages has dropped."""
        gone = pa.concat_tables([self.dropped(stage) for stage in ["takedown", *before]])[
            "id"
        ].combine_chunks()
        return ~pc.is_in(ids, value_set=gone).to_numpy(zero_copy_only=False)

    def write_edges(self, kind: str, a: pa.Array, b: pa.Array, similarity: np.ndarray) -> None:
        table = pa.table({"a": a, "b": b, "similarity": similarity, "kind": [kind] * len(similarity)})
        table = table.take(pc.sort_indices(table, [("a", "ascending"), ("b", "ascending")]))
        write_format(self.folder / "edges" / f"{kind}.parquet", table, EDGES_SCHEMA)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _sorted(source: Source) -> Source:
    return source.select(pc.sort_indices(source.table["id"]).to_numpy())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
