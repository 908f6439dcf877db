"""Say what became of one picture in a curation run, and why: dinov2 explain RUN PICTURE."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import yaml
from pyarrow import parquet

from curation.config import TOLD
from curation.named import Pictures
from curation.taken import COPY, EQUAL, NAMED, taken
from dinov2.console import run as run_command
from dinov2.data.manifest import DECISIONS_SCHEMA, EDGES_SCHEMA, read_format
from dinov2.exits import UserError
from dinov2.folders import CONFIG

FACTS = ("source", "label", "split", "licence", "consent")
WHY = {None: "named", NAMED: "named", EQUAL: "equal in bytes or pixels to", COPY: "taken for a copy of"}
EDGES = {"duplicate": "alike", "holdout": "like a holdout picture", "retrieval": "asked for by the seed"}
FORMS = "an id, a uri, the end of a uri, or the path of a file"


def main(words: list[str]) -> None:
    """`dinov2 explain RUN PICTURE`, PICTURE by id, uri, the end of a uri, or path."""
    if words[:1] in (["-h"], ["--help"]) or len(words) != 2:
        raise UserError(f"usage: dinov2 explain RUN PICTURE (a curation folder; {FORMS})")
    print("\n".join(explain(Path(words[0]), words[1])))


def explain(folder: Path, picture: str) -> Iterator[str]:
    """Lines of the whole path of one picture, from what was read of it to the shard it lies in.

    Raises:
        UserError: the folder is no run of curation, has no decisions yet, or no such picture.
    """
    settings = _settings(folder)
    if not (folder / "decisions.parquet").exists():
        raise UserError(_unfinished(folder, settings))
    names = Pictures.of(folder, read_format(folder / "decisions.parquet", DECISIONS_SCHEMA), settings)
    role, row = names.find(picture)
    name = row["id"]
    yield f"{name}  {row['uri']}"
    if role != "pool":
        yield from ABOUT[role](folder, name, names)
        return
    if row["dropped_by"] != "takedown":  # how it looked is nobody's business any more
        yield from _looks(folder, name)
        yield from _filters(folder, name)
    for path in sorted((folder / "edges").glob("*.parquet")):
        yield from _edges(path, name, names)
    yield from _component(folder, name, names)
    yield from _clusters(folder, name)
    yield _verdict(row, names) + _asked(folder, name)
    yield from _written(folder, name)


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load((folder / CONFIG).read_text())
    except (OSError, yaml.YAMLError):
        settings = None
    if not isinstance(settings, dict) or "pool" not in settings:
        raise UserError(f"{folder} is no folder of dinov2 curate; name the output= of a run")
    return settings


def _unfinished(folder: Path, settings: dict[str, Any]) -> str:
    done = [stage for stage in TOLD if (folder / "stages" / stage / "done.json").exists()]
    far = f"as far as {done[-1]}" if done else "through no stage"
    words = [str(folder / CONFIG), f"output={folder}"]
    words += [f"{key}=null" for key in ("stop_after", "shard") if settings.get(key) is not None]
    return (
        f"{folder} has got {far}, and has decisions from the stage write on; go on with: dinov2 curate "
        + shlex.join(words)
    )


def _of_holdout(folder: Path, name: str, names: Pictures) -> Iterator[str]:
    yield "  a picture of the holdout, not of the pool"
    path = folder / "leaks.parquet"
    leaks = (
        parquet.read_table(path, filters=[("holdout_id", "==", name)]).to_pylist() if path.exists() else []
    )
    for row in sorted(leaks, key=lambda row: (-row["similarity"], row["pool_id"])):
        yield f"  leaked, similarity {row['similarity']:.3f}, as {names(row['pool_id'])}"
    if not leaks:
        yield "  nothing in the pool is a leak of it"


def _of_seeds(folder: Path, name: str, names: Pictures) -> Iterator[str]:
    yield "  a seed, not a picture of the pool"
    path = folder / "edges" / "retrieval.parquet"
    edges = parquet.read_table(path, filters=[("a", "==", name)]).to_pylist() if path.exists() else []
    for row in sorted(edges, key=lambda row: (-row["similarity"], row["b"])):
        yield f"  asks for, similarity {row['similarity']:.3f}, {names(row['b'])}"


ABOUT = {"holdout": _of_holdout, "seeds": _of_seeds}


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


def _edges(path: Path, name: str, names: Pictures) -> Iterator[str]:
    edges = read_format(path, EDGES_SCHEMA)
    mine = edges.filter(pc.or_(pc.equal(edges["a"], name), pc.equal(edges["b"], name)))
    for row in mine.sort_by([("similarity", "descending")]).to_pylist():
        other = row["b"] if row["a"] == name else row["a"]
        yield f"  {EDGES[row['kind']]} {row['similarity']:.3f} {names(other)}"


def _component(folder: Path, name: str, names: Pictures) -> Iterator[str]:
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


def _verdict(row: dict, names: Pictures) -> str:
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
            told = [f"{key} {row[key]}" for key in FACTS if row[key]]
            yield f"  {row['shard']}, {row['size']:,} bytes from {row['offset']:,}; {', '.join(told)}"


if __name__ == "__main__":
    run_command(main, "explain")
