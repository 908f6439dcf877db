"""Say what became of one picture in a curation run, and why: dinov2 explain RUN PICTURE."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from curation.taken import COPY, EQUAL, NAMED, taken
from dinov2.console import run as run_command
from dinov2.data.manifest import DECISIONS_SCHEMA, EDGES_SCHEMA, read_format
from dinov2.exits import UserError

TOLD = ("source", "label", "split", "licence", "consent")
WHY = {None: "named", NAMED: "named", EQUAL: "equal in bytes or pixels to", COPY: "taken for a copy of"}
EDGES = {"duplicate": "alike", "holdout": "like a holdout picture", "retrieval": "asked for by the seed"}


def main(words: list[str]) -> None:
    """`dinov2 explain RUN PICTURE`, PICTURE by id, uri, or the end of a uri."""
    if words[:1] in (["-h"], ["--help"]) or len(words) != 2:
        raise UserError(
            "usage: dinov2 explain RUN PICTURE (a curation folder; an id, a uri, or the end of a uri)"
        )
    print("\n".join(explain(Path(words[0]), words[1])))


def explain(folder: Path, picture: str) -> Iterator[str]:
    """Lines of the whole path of one picture, from what was read of it to the shard it lies in."""
    decisions = read_format(folder / "decisions.parquet", DECISIONS_SCHEMA)
    row = find(decisions, picture)
    name, names = row["id"], Names(folder, decisions)
    yield f"{name}  {row['uri']}"
    if row["dropped_by"] != "takedown":  # how it looked is nobody's business any more
        yield from _looks(folder, name)
        yield from _filters(folder, name)
    for path in sorted((folder / "edges").glob("*.parquet")):
        yield from _edges(path, name, names)
    yield from _component(folder, name, names)
    yield from _clusters(folder, name)
    yield _verdict(row, names) + _asked(folder, name)
    yield from _written(folder, name)


class Names:
    """Uris of pictures of the pool, the seeds and the holdout, by id."""

    def __init__(self, folder: Path, decisions: pa.Table) -> None:
        others = [
            parquet.read_table(path, columns=["id", "uri"])
            for role in ("seeds", "holdout")
            if (path := folder / "stages" / "embed" / role / "ids.parquet").exists()
        ]
        self._tables = [decisions, *others]

    def __call__(self, name: str) -> str:
        """The id, and the uri where there is one."""
        for table in self._tables:
            row = pc.index(table["id"], name).as_py()
            if row >= 0:
                return f"{name} {table['uri'][row].as_py()}"
        return name


def find(decisions: pa.Table, picture: str) -> dict:
    """The row of the picture with this id, uri, or end of uri.

    Raises:
        UserError: none, or several, match.
    """
    for match in (
        pc.equal(decisions["id"], picture),
        pc.equal(decisions["uri"], picture),
        pc.ends_with(decisions["uri"], picture),
    ):
        rows = decisions.filter(match)
        if len(rows) == 1:
            return rows.to_pylist()[0]
        if len(rows) > 1:
            few = ", ".join(rows["uri"].to_pylist()[:3])
            raise UserError(
                f"{len(rows)} pictures match {picture!r}, such as {few}; give more of the uri, or the id"
            )
    raise UserError(f"no picture of this run has the id or uri {picture!r}")


def _looks(folder: Path, name: str) -> Iterator[str]:
    for part in sorted((folder / "stages" / "ingest" / "pool").glob("*.parquet")):
        table = parquet.read_table(part, filters=[("id", "==", name)])
        for row in table.to_pylist():
            if row["error"] is None:
                flags = f", flagged {', '.join(row['flags'])}" if row["flags"] else ""
                yield f"  {row['format']} {row['width']} x {row['height']}, {row['bytes']:,} bytes{flags}"
                yield f"  sha256 {row['sha256']}, pixels {row['pixel_sha256']}"
                yield f"  perceptual hash {row['phash']:016x}, PCA hash {row['pca_hash']:016x}"


def _filters(folder: Path, name: str) -> Iterator[str]:
    for part in sorted((folder / "stages" / "filters" / "pool").glob("*.parquet")):
        for row in parquet.read_table(part, filters=[("id", "==", name)]).to_pylist():
            faces = row.pop("faces", None)
            scores = [f"{key} {value:.4f}" for key, value in row.items() if key not in ("id", "sha256")]
            if faces:
                scores.append(f"{len(faces)} faces blurred where it is written: {faces}")
            if scores:
                yield "  filters: " + ", ".join(scores)


def _edges(path: Path, name: str, names: Names) -> Iterator[str]:
    edges = read_format(path, EDGES_SCHEMA)
    mine = edges.filter(pc.or_(pc.equal(edges["a"], name), pc.equal(edges["b"], name)))
    for row in mine.sort_by([("similarity", "descending")]).to_pylist():
        other = row["b"] if row["a"] == name else row["a"]
        yield f"  {EDGES[row['kind']]} {row['similarity']:.3f} {names(other)}"


def _component(folder: Path, name: str, names: Names) -> Iterator[str]:
    path = folder / "stages" / "duplicates" / "components.parquet"
    if not path.exists():
        return
    for row in parquet.read_table(path, filters=[("id", "==", name)]).to_pylist():
        members = parquet.read_table(path, filters=[("component", "==", row["component"])])
        kept = [names(one) for one in members.filter(members["kept"])["id"].to_pylist()]
        least = pc.min(members["similarity"]).as_py()
        shape = f"a component of {row['size']}, diameter {row['diameter']}, least likeness {least:.3f}"
        yield f"  one of {shape}; of it stays {', '.join(kept) or 'none'}"


def _clusters(folder: Path, name: str) -> Iterator[str]:
    path = folder / "clusters.parquet"
    if path.exists():
        for row in parquet.read_table(path, filters=[("id", "==", name)]).to_pylist():
            levels = ", ".join(f"{key} {value}" for key, value in row.items() if key.startswith("level_"))
            yield f"  clusters: {levels}; {row['distance']:.3f} from the centroid"


def _verdict(row: dict, names: Names) -> str:
    if row["kept"]:
        return "kept"
    words = [f"dropped by {row['dropped_by']}"]
    if row["evidence"]:
        words.append(f"lost to {names(row['evidence'])}")
    if row["similarity"] is not None:
        words.append(f"similarity {row['similarity']:.3f}")
    if row["error"]:
        words.append(row["error"])
    return ", ".join(words)


def _asked(folder: Path, name: str) -> str:
    """By which word of which day's list it was taken out, if it was."""
    record = taken(folder)
    for row in record.filter(pc.equal(record["id"], name)).to_pylist():
        return f": {WHY[row['why']]} {row['asked']}, on {row['on']}"
    return ""


def _written(folder: Path, name: str) -> Iterator[str]:
    path = folder / "manifest.parquet"
    if path.exists():
        for row in parquet.read_table(path, filters=[("id", "==", name)]).to_pylist():
            told = [f"{key} {row[key]}" for key in TOLD if row[key]]
            yield f"  {row['shard']}, {row['size']:,} bytes from {row['offset']:,}; {', '.join(told)}"


if __name__ == "__main__":
    run_command(main, "explain")
