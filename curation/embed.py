"""Stage 2: an embedding of every readable picture of pool, seeds and holdout, in `stages/embed/ROLE`.

Either the built-in descriptor, whitened on the pool, or a backbone. Both leave the same kind of folder:
`00000.npy` … fp16 rows of length 1, `ids.parquet`, `meta.json`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from curation.config import BUILT_IN
from curation.descriptor import Whitening
from curation.ingest import Ingested
from curation.run import Run
from dinov2.console import progress
from dinov2.files import sha256_of, write_json, write_table, write_whole

ROWS_PER_FILE = 8192


def run(run: Run) -> dict[str, Any]:
    """Embed all sets alike."""
    if run.config.backbone == BUILT_IN:
        whitening = _whitening(run)
        for role in run.sets:
            _embed_descriptor(run, role, whitening)
    else:
        _embed_backbone(run)
    pool = Embedded(run, "pool")
    return {"pictures": len(pool.ids), "dimension": int(pool.vectors.shape[1])}


def _whitening(run: Run) -> Whitening:
    """Fitted once, on the pool pictures with the lowest ids (ids are hashes, so that is a random sample)."""
    path = run.stage("embed") / "whitening.npz"
    if not path.exists():
        raw = Ingested(run, "pool").raw()
        sample = raw.rows(np.arange(min(len(raw), run.config.embed.sample))).astype(np.float32)
        with threadpool_limits(1):  # sums on one thread: the same bits whatever the machine is busy with
            whitening = Whitening.fit(sample, run.config.embed.dimension)
        with write_whole(path) as file:
            np.savez(file, mean=whitening.mean, matrix=whitening.matrix)
    with np.load(path) as stored:
        return Whitening(stored["mean"], stored["matrix"])


def _embed_descriptor(run: Run, role: str, whitening: Whitening) -> None:
    ingested = Ingested(run, role)
    folder = run.stage("embed") / role
    raw = ingested.raw()
    starts = range(0, len(raw), ROWS_PER_FILE)
    with threadpool_limits(1):
        for number, start in enumerate(progress(starts, what=f"embed {role}", unit="piece")):
            path = folder / f"{number:05d}.npy"
            if not path.exists():
                rows = raw.rows(np.arange(start, min(start + ROWS_PER_FILE, len(raw))))
                with write_whole(path) as file:
                    np.save(file, whitening(rows.astype(np.float32)).astype(np.float16))
    write_table(folder / "ids.parquet", ingested.readable().select(["id"]))
    meta = {
        "format_version": "1.0",
        "weights": sha256_of(run.stage("embed") / "whitening.npz"),
        "transform": f"curation.descriptor of a {64} x {64} thumbnail, whitened on the pool",
        "dimension": int(whitening.matrix.shape[1]),
        "token": BUILT_IN,
    }
    write_json(folder / "meta.json", meta)


def _embed_backbone(run: Run) -> None:
    # Imported here: torch takes seconds, and the built-in descriptor does without.
    from dinov2.features import BackboneEmbedder, embed
    from dinov2.models import load_backbone

    config = run.config.embed
    backbone = load_backbone(run.config.backbone, device=run.config.device)
    embedder = BackboneEmbedder(
        backbone, size=config.size, resize=config.resize, token=config.token, device=run.config.device
    )
    for role, source in run.sets.items():
        embed(
            source, embedder, run.stage("embed") / role, rows_per_file=ROWS_PER_FILE, batch=config.batch,
            workers=run.config.workers, what=f"embed {role}",
        )  # fmt: skip


class Embedded:
    """The embeddings of one set, rows in the order of `Ingested.readable()`."""

    def __init__(self, run: Run, role: str):
        from dinov2.features import Embeddings

        found = Embeddings.open(run.stage("embed") / role)
        wanted = Ingested(run, role).readable()["id"].combine_chunks()
        have = pa.array(found.ids, pa.large_string())
        if not have.equals(wanted):
            raise ValueError(f"stages/embed/{role} holds other pictures than stages/ingest/{role}")
        self.ids = wanted
        self.vectors: NDArray[np.float16] = found.array()


def folder_of(run: Run, role: str) -> Path:
    return run.stage("embed") / role
