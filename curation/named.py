"""Which picture of a run somebody means who names it by id, uri, the end of a uri, or a path on the disk."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from dinov2.data.cache import Cache, is_remote
from dinov2.data.gather import rows_of
from dinov2.data.lists import FILE, place_of
from dinov2.data.specs import parse
from dinov2.data.tars import printable
from dinov2.exits import UserError

COMPARED = 20_000  # uris that an unknown name is compared with
FEW = 3
OTHERS = ("holdout", "seeds")  # pictures of a run that are not of its pool


@dataclass(frozen=True)
class Pictures:
    """The pictures of a run: for "pool", and for "holdout" and "seeds" where they were read, id and uri."""

    tables: dict[str, pa.Table]
    settings: dict[str, Any]  # of the run, as its config.yaml has them

    @classmethod
    def of(cls, folder: Path, decisions: pa.Table, settings: dict[str, Any]) -> "Pictures":
        """Those of a run with these decisions, whose rows the pool's pictures have."""
        paths = {role: folder / "stages" / "embed" / role / "ids.parquet" for role in OTHERS}
        others = {
            role: parquet.read_table(path, columns=["id", "uri"])
            for role, path in paths.items()
            if path.exists()
        }
        return cls({"pool": decisions, **others}, settings)

    def __call__(self, name: str) -> str:
        """The id, and the uri where there is one."""
        for table in self.tables.values():
            row = pc.index(table["id"], name).as_py()
            if row >= 0:
                return f"{name} {table['uri'][row].as_py()}"
        return name

    def find(self, picture: str) -> tuple[str, dict[str, Any]]:
        """What is meant: "pool", "holdout" or "seeds", and the row of that table; the pool comes first.

        Raises:
            UserError: none, or several, match.
        """
        several: list[str] = []
        for found in self._matches(picture):
            for role, rows in found:
                if len(rows) == 1:
                    return role, rows.to_pylist()[0]
                if len(rows) > 1:
                    several = several or rows["uri"].to_pylist()
        if several:
            few = ", ".join(several[:FEW])
            raise UserError(
                f"{len(several)} pictures match {picture!r}, such as {few}; give more of the uri, the id, "
                "or a path to the file"
            )
        raise UserError(self._unknown(picture))

    def _matches(self, picture: str) -> Iterator[list[tuple[str, pa.Table]]]:
        """Rows by role, in each way of naming; the surest first."""
        tables = self.tables.items()
        yield [(role, table.filter(pc.equal(table["id"], picture))) for role, table in tables]
        if os.path.isfile(picture):
            yield [(role, self._at_path(role, table, picture)) for role, table in tables]
        yield [(role, table.filter(pc.equal(table["uri"], picture))) for role, table in tables]
        yield [(role, table.filter(pc.ends_with(table["uri"], picture))) for role, table in tables]

    def _at_path(self, role: str, table: pa.Table, path: str) -> pa.Table:
        """Rows of the pictures whose file this is."""
        specs = [self.settings.get(key) for key in (("pool", "as_is") if role == "pool" else (role,))]
        ids = [name for spec in specs if spec for name in _ids_at(spec, self.settings.get("cache"), path)]
        return table.filter(pc.is_in(table["id"], value_set=pa.array(ids, table["id"].type)))

    def _unknown(self, picture: str) -> str:
        uris = self.tables["pool"]["uri"]
        same = uris.filter(pc.ends_with(uris, "/" + os.path.basename(picture)))
        near = same[:FEW].to_pylist() or get_close_matches(
            picture, uris[:COMPARED].to_pylist(), n=FEW, cutoff=0.5
        )
        there = " though there is such a file," if os.path.isfile(picture) else ""
        hint = f"; the nearest: {', '.join(near)}" if near else ""
        return (
            f"no picture of this run is called {picture!r},{there} by id, by uri as in decisions.parquet, by "
            f"the end of a uri, or by the path of a file in pool={self.settings.get('pool')}{hint}"
        )


def _ids_at(spec: str, cache: str | None, path: str) -> Iterator[str]:
    """Ids of the pictures in these sources whose file this is. Of sources that are gone, or remote, none."""
    wanted = os.path.realpath(path)
    with suppress(UserError):  # such as relative paths, seen from another folder
        for one in parse(spec):
            if is_remote(one.place) or ".tar" in os.path.basename(one.place):
                continue
            rows = _likely(rows_of(one, Cache(cache)), {os.path.basename(path), os.path.basename(wanted)})
            for row in rows.to_pylist():
                if (
                    not is_remote(row["uri"])
                    and os.path.realpath(place_of(row["path"], row["uri"])) == wanted
                ):
                    yield row["id"]


def _likely(table: pa.Table, names: set[str]) -> pa.Table:
    """Rows of files that may have one of these names: asking the disk where each file lies takes long."""
    uris = table["uri"]
    likely = pc.starts_with(uris, FILE)  # whose names may be quoted
    for name in names:
        likely = pc.or_(likely, pc.ends_with(uris, printable(name)))
    return table.filter(pc.and_(likely, pc.is_null(table["offset"])))
