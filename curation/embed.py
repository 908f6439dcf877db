"""Stage 2: an embedding of every readable picture of pool, seeds and holdout, in `stages/embed/ROLE`.

Either the built-in descriptor, whitened on the pool, or a backbone. Both leave the same kind of folder
(`dinov2.features.Embeddings`), with rows of length 1 in the order of `Ingested.readable()`.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from threadpoolctl import threadpool_limits

from curation.config import BUILT_IN, CurateConfig
from curation.descriptor import Whitening
from curation.ingest import Ingested
from curation.looks import THUMB
from curation.run import Run
from curation.synthetic import changes
from dinov2.console import progress
from dinov2.files import sha256_of, write_json, write_table, write_whole

if TYPE_CHECKING:
    from dinov2.features import BackboneEmbedder

ROWS_PER_FILE = 8192


def run(run: Run) -> dict[str, Any]:
    """Embed all sets alike."""
    if run.config.backbone == BUILT_IN:
        whitening = _whitening(run)
        for role in run.sets:
            _embed_descriptor(run, role, whitening)
    else:
        _embed_backbone(run)
    count, dimension = Embedded(run, "pool").vectors.shape
    return {"pictures": count, "dimension": dimension}


def _whitening(run: Run) -> Whitening:
    """Fitted once, on the pool pictures with the lowest ids (ids are hashes, so that is a random sample)."""
    path = run.stage("embed") / "whitening.npz"
    if not path.exists():
        pool, config = Ingested(run, "pool"), run.config.embed
        raw = pool.raw()
        sample = raw.rows(np.arange(min(len(raw), config.sample))).astype(np.float32)
        copied = np.arange(min(len(raw), config.copied))
        with threadpool_limits(1):  # sums on one thread: the same bits whatever the machine is busy with
            moved = changes(
                pool.thumbs().rows(copied), sample[copied], np.random.default_rng(run.config.seed)
            )
            whitening = Whitening.fit(sample, moved, config.dimension)
        with write_whole(path) as file:
            np.savez(file, mean=whitening.mean, matrix=whitening.matrix)
    with np.load(path) as stored:
        return Whitening(stored["mean"], stored["matrix"])


def _embed_descriptor(run: Run, role: str, whitening: Whitening) -> None:
    """Write the folder that `dinov2.features.embed` would, from the raw descriptors that ingest left."""
    from dinov2.features.folder import (  # imported here: it brings torch, which is slow
        FORMAT_VERSION,
        IDS,
        META,
    )

    folder = run.stage("embed") / role
    raw = Ingested(run, role).raw()
    with threadpool_limits(1), progress(total=len(raw), what=f"embed {role}") as bar:
        for number, start in enumerate(range(0, len(raw), ROWS_PER_FILE)):
            path = folder / f"{number:05d}.npy"
            rows = np.arange(start, min(start + ROWS_PER_FILE, len(raw)))
            if not path.exists():
                with write_whole(path) as file:
                    np.save(file, whitening(raw.rows(rows).astype(np.float32)).astype(np.float16))
            bar.update(len(rows))
    source = run.sets[role]
    errors = Ingested(run, role).table["error"]
    write_table(folder / IDS, source.table.select(["id", "uri"]).filter(errors.is_null()))
    meta = {
        "format_version": FORMAT_VERSION,
        "weights": sha256_of(run.stage("embed") / "whitening.npz"),
        "transform": {"kind": f"curation.descriptor of a {THUMB} x {THUMB} thumbnail, whitened"},
        "token": BUILT_IN,
        "parts": [[BUILT_IN, int(whitening.matrix.shape[1])]],
        "dimension": int(whitening.matrix.shape[1]),
        "normalised": True,
        "data": source.fingerprint,
        "rows": len(raw),
        "rows_per_file": ROWS_PER_FILE,
        "unreadable": _unreadable(source.table, errors),
    }
    write_json(folder / META, meta)


def _unreadable(table: pa.Table, errors: pa.ChunkedArray) -> list[list[str]]:
    bad = table.select(["id", "uri"]).append_column("error", errors).filter(errors.is_valid())
    return [[row["id"], row["uri"], row["error"]] for row in bad.to_pylist()]


def check(config: CurateConfig) -> None:
    """Raises UserError for a backbone that could not embed, before the pool is read, which may take long."""
    if config.backbone != BUILT_IN:
        _backbone(config)


def _backbone(config: CurateConfig) -> "BackboneEmbedder":
    from dinov2.features import BackboneEmbedder  # imported here: the descriptor does without torch
    from dinov2.models import load_backbone
    from dinov2.parallel import pick_device

    device = pick_device(config.device)
    backbone = load_backbone(config.backbone, device=device)
    size = config.embed.size or int(backbone.image_size)
    return BackboneEmbedder(backbone, size=size, token=config.embed.token, normalised=True, device=device)


def _embed_backbone(run: Run) -> None:
    from dinov2.features import embed  # imported here: the descriptor does without torch

    config = run.config.embed
    embedder = _backbone(run.config)
    for role, source in run.sets.items():
        readable = np.flatnonzero(Ingested(run, role).table["error"].is_null().to_numpy())
        embed(
            source.select(readable),
            embedder,
            run.stage("embed") / role,
            rows_per_file=ROWS_PER_FILE,
            batch=config.batch,
            workers=run.workers.count if run.workers.count > 1 else 0,
            what=f"embed {role}",
        )


class Embedded:
    """The embeddings of one set, rows in the order of `Ingested.readable()`."""

    def __init__(self, run: Run, role: str) -> None:
        from dinov2.features import Embeddings  # imported here: it brings torch

        self.vectors = Embeddings.open(run.stage("embed") / role)
        self.ids = Ingested(run, role).readable()["id"].combine_chunks()
        if self.vectors.ids != self.ids.to_pylist():
            raise ValueError(f"stages/embed/{role} holds other pictures than stages/ingest/{role}")
