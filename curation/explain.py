"""Say what became of one picture in a curation run, and why: dinov2 explain RUN PICTURE."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from dinov2.console import run as run_command
from dinov2.data.manifest import DECISIONS_SCHEMA, EDGES_SCHEMA, read_format
from dinov2.exits import UserError


def main(words: list[str]) -> None:
    """`dinov2 explain RUN PICTURE`, PICTURE by id, uri, or the end of a uri."""
    if words[:1] in (["-h"], ["--help"]) or len(words) != 2:
        raise UserError(
            "usage: dinov2 explain RUN PICTURE (a curation folder; an id, a uri, or the end of a uri)"
        )
    print("\n".join(explain(Path(words[0]), words[1])))


def explain(folder: Path, picture: str) -> Iterator[str]:
    """Lines of the whole path of one picture: what was read, its neighbours, its component, the decision."""
    decisions = read_format(folder / "decisions.parquet", DECISIONS_SCHEMA)
    row = find(decisions, picture)
    name = row["id"]
    yield f"{name}  {row['uri']}"
    yield from _looks(folder, name)
    uris = dict(zip(decisions["id"].to_pylist(), decisions["uri"].to_pylist(), strict=True))
    for path in sorted((folder / "edges").glob("*.parquet")):
        yield from _edges(path, name, uris)
    yield from _component(folder, name)
    yield _verdict(row, uris)


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


def _edges(path: Path, name: str, uris: dict[str, str]) -> Iterator[str]:
    edges = read_format(path, EDGES_SCHEMA)
    mine = edges.filter(pc.or_(pc.equal(edges["a"], name), pc.equal(edges["b"], name)))
    for row in mine.sort_by([("similarity", "descending")]).to_pylist():
        other = row["b"] if row["a"] == name else row["a"]
        yield f"  {row['kind']} {row['similarity']:.3f} {other}  {uris.get(other, '')}".rstrip()


def _component(folder: Path, name: str) -> Iterator[str]:
    path = folder / "stages" / "duplicates" / "components.parquet"
    if path.exists():
        for row in parquet.read_table(path, filters=[("id", "==", name)]).to_pylist():
            yield f"  one of a component of {row['size']}"


def _verdict(row: dict, uris: dict[str, str]) -> str:
    if row["kept"]:
        return "kept"
    words = [f"dropped by {row['dropped_by']}"]
    if row["evidence"]:
        words.append(f"lost to {row['evidence']} {uris.get(row['evidence'], '')}".rstrip())
    if row["similarity"] is not None:
        words.append(f"similarity {row['similarity']:.3f}")
    if row["error"]:
        words.append(row["error"])
    return ", ".join(words)


if __name__ == "__main__":
    run_command(main, "explain")
