"""Stage 2: scores of classifiers that the user names, as of unsafe pictures, and faces to be blurred.

A step is a line of STEPS: it looks at a batch of decoded pictures, and gives a column. Whose score is over
the classifier's limit is dropped. Where faces were found the picture is written with them blurred
(`curation.faces`), under its own id, with the hashes of what is written and the flag "faces blurred" in the
manifest. Everything between, such as the search for copies, goes by the pictures as they came.

A piece is `NNNNN.parquet` with a row for each readable picture of the pool.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from pyarrow import parquet

from curation import classify, faces
from curation.config import ClassifierConfig, CurateConfig, FiltersConfig
from curation.faces import Box
from curation.ingest import Ingested
from curation.run import Run
from dinov2.data.decode import Unreadable, decode
from dinov2.data.sources import Source
from dinov2.files import write_table

BATCH = 64  # pictures that are decoded together
BLURRED = "faces blurred"  # flag in the manifest
FACES = "faces"

Column = tuple[str, pa.DataType, list[Any]]


def run(run: Run) -> dict[str, Any]:
    """Score the pool, look for faces, and drop what a classifier says is over its limit."""
    settings = run.config.filters
    if not settings.classifiers and not settings.faces.blur:
        run.drop("filters", {"id": []})
        return {"dropped": 0}
    check(run.config)
    ingested = Ingested(run, "pool").table
    readable = np.flatnonzero(ingested["error"].is_null().to_numpy())
    tall, folder = run.config.ingest.piece, run.stage("filters")
    spans = [readable[at : at + tall] for at in range(0, len(readable), tall)]
    paths = [folder / "pool" / f"{number:05d}.parquet" for number in range(len(spans))]
    wanted = run.share.take(len(spans), lambda number: paths[number].exists(), "filters")
    before = run.before("filters")
    pieces = [
        Piece(
            paths[number],
            run.sets["pool"].select(spans[number]),
            ingested["sha256"].take(spans[number]).to_pylist(),
            before,
        )
        for number in wanted
    ]
    work = partial(filter_piece, config=run.config)
    run.workers.do(work, pieces, what="filters", total=run.share.part_of(len(readable), pieces))
    run.share.leave("filters")
    return _decide(run, settings)


def check(config: CurateConfig) -> None:
    """Raises UserError for a model or a detector that is missing, another one, or cannot be read."""
    for name, settings in config.filters.classifiers.items():
        classify.check(name, settings)
    faces.check(config.filters.faces)


def boxes_of(run: Run) -> dict[str, list[Box]]:
    """Faces to be blurred, by the id of the picture; only pictures that have some."""
    if not run.config.filters.faces.blur:
        return {}
    table = found(run)
    table = table.filter(pc.greater(pc.list_value_length(table[FACES]), 0))
    return {row["id"]: _boxes(row[FACES]) for row in table.select(["id", FACES]).to_pylist()}


def found(run: Run) -> pa.Table:
    """What all pieces hold: id, sha256, and a column for each step."""
    return pa.concat_tables(
        [parquet.read_table(path) for path in sorted((run.stage("filters") / "pool").glob("*.parquet"))]
    )


@dataclass(frozen=True)
class Piece:
    """Readable pictures, the hashes of their bytes, where the result goes, and what was found before."""

    path: Path
    source: Source
    sha256: list[str]
    before: Path | None

    def __len__(self) -> int:
        return len(self.source)


def filter_piece(piece: Piece, *, config: CurateConfig) -> int:
    """Write what every step says of the pictures of a piece; returns how many there are."""
    known = _known(piece.before) if piece.before is not None else {}
    keys = list(zip(piece.source.ids, piece.sha256, strict=True))
    fresh = [row for row, key in enumerate(keys) if key not in known]
    rows: dict[tuple[str, str], dict[str, Any]] = {key: known[key] for key in keys if key in known}
    for at in range(0, len(fresh), BATCH):
        some = fresh[at : at + BATCH]
        images = [_decoded(piece.source, row, config) for row in some]
        columns = [column for step in STEPS.values() for column in step(images, config)]
        for place, row in enumerate(some):
            values = {name: column[place] for name, _, column in columns}
            rows[keys[row]] = {"id": keys[row][0], "sha256": keys[row][1], **values}
    schema = pa.schema([("id", pa.large_string()), ("sha256", pa.large_string()), *_kinds(config.filters)])
    write_table(piece.path, pa.Table.from_pylist([rows[key] for key in keys], schema=schema))
    return len(piece)


def _scores(images: Sequence[Image.Image], config: CurateConfig) -> list[Column]:
    return [
        (name, pa.float32(), _classifier(name, config)(images).tolist())
        for name in config.filters.classifiers
    ]


def _faces(images: Sequence[Image.Image], config: CurateConfig) -> list[Column]:
    if not config.filters.faces.blur:
        return []
    boxes = [[list(box) for box in faces.faces_in(image, config.filters.faces)] for image in images]
    return [(FACES, pa.list_(pa.list_(pa.int32())), boxes)]


STEPS: dict[str, Callable[[Sequence[Image.Image], CurateConfig], list[Column]]] = {
    "scores": _scores,
    "faces": _faces,
}


def _kinds(settings: FiltersConfig) -> list[tuple[str, pa.DataType]]:
    scores: list[tuple[str, pa.DataType]] = [(name, pa.float32()) for name in settings.classifiers]
    return scores + ([(FACES, pa.list_(pa.list_(pa.int32())))] if settings.faces.blur else [])


def _decide(run: Run, settings: FiltersConfig) -> dict[str, Any]:
    table = found(run)
    live = run.kept(table["id"].combine_chunks(), ["ingest"])
    over: dict[str, str] = {}
    counts: dict[str, Any] = {"pictures": len(table)}
    for name, classifier in settings.classifiers.items():
        score = table[name].to_numpy()
        bad = np.flatnonzero((score > np.float32(classifier.most)) & live)
        counts[name] = len(bad)
        for row in bad.tolist():
            over.setdefault(table["id"][row].as_py(), f"{name}: {score[row]:.4f} is over {classifier.most:g}")
    run.drop("filters", {"id": list(over), "error": list(over.values())})
    if settings.faces.blur:
        counts["with faces"] = int(pc.sum(pc.greater(pc.list_value_length(table[FACES]), 0)).as_py() or 0)
    return {**counts, "dropped": len(over)}


def _decoded(source: Source, row: int, config: CurateConfig) -> Image.Image:
    try:
        return decode(source.read(row), max_pixels=config.ingest.max_pixels)
    except Unreadable:  # it went away after ingest, which could read it
        return Image.new("RGB", (64, 64))


def _boxes(rows: list[list[int]]) -> list[Box]:
    return [(left, top, width, height) for left, top, width, height in rows]


@cache
def _known(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What was found before other pictures came, by id and SHA-256."""
    tables = [parquet.read_table(path) for path in sorted((folder / "pool").glob("*.parquet"))]
    return {(row["id"], row["sha256"]): row for table in tables for row in table.to_pylist()}


def _classifier(name: str, config: CurateConfig) -> classify.Classifier:
    return _loaded(name, json.dumps(asdict(config.filters.classifiers[name])), config.device)


@cache
def _loaded(name: str, told: str, device: str) -> classify.Classifier:
    """Once a process: a model takes seconds to load."""
    return classify.Classifier(name, ClassifierConfig(**json.loads(told)), device)
