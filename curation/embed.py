"""Stage 2: an embedding of every readable picture of pool, seeds and holdout, in `stages/embed/ROLE`.

Either the built-in descriptor, whitened on the pool, or a backbone. Both leave the same kind of folder
(`dinov2.features.Embeddings`), with rows of length 1 in the order of `Ingested.readable()`.
"""

from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from curation.config import BUILT_IN, CurateConfig
from curation.descriptor import Whitening
from curation.ingest import Ingested, rows_before
from curation.looks import THUMB
from curation.run import Run
from curation.synthetic import changes
from dinov2.console import progress
from dinov2.data.sources import Source
from dinov2.exits import UserError
from dinov2.files import read_json, sha256_of, write_bytes, write_json, write_table, write_whole

if TYPE_CHECKING:
    from dinov2.features import BackboneEmbedder, Embeddings

ROWS_PER_FILE = 8192


def run(run: Run) -> dict[str, Any]:
    """Embed all sets alike."""
    if run.config.backbone == BUILT_IN:
        whitening = whitening_of(run)
        for role in run.sets:
            _embed_descriptor(run, role, whitening)
        run.share.leave("embed")
        for role in run.sets:
            _describe_folder(run, role, int(whitening.matrix.shape[1]))
    else:
        _embed_backbone(run)
    count, dimension = Embedded(run, "pool").vectors.shape
    return {"pictures": count, "dimension": dimension}


def whitening_of(run: Run) -> Whitening:
    """Fitted once, on the pool pictures with the lowest ids (ids are hashes, so that is a random sample)."""
    path = run.stage("embed") / "whitening.npz"
    before = run.before("embed")
    if not path.exists() and before is not None and (before / path.name).exists():
        write_bytes(path, (before / path.name).read_bytes())  # so that what was embedded stays as it was
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
    folder = run.stage("embed") / role
    raw = Ingested(run, role).raw()
    files = -(-len(raw) // ROWS_PER_FILE)
    wanted = run.share.take(files, lambda number: (folder / f"{number:05d}.npy").exists(), f"embed {role}")
    with threadpool_limits(1), progress(total=len(wanted), what=f"embed {role}", unit="file") as bar:
        for number in wanted:
            rows = np.arange(number * ROWS_PER_FILE, min((number + 1) * ROWS_PER_FILE, len(raw)))
            with write_whole(folder / f"{number:05d}.npy") as file:
                np.save(file, whitening(raw.rows(rows).astype(np.float32)).astype(np.float16))
            bar.update(1)


def _describe_folder(run: Run, role: str, dimension: int) -> None:
    from dinov2.features.folder import (  # imported here: it brings torch, which is slow
        FORMAT_VERSION,
        IDS,
        META,
    )

    folder, source = run.stage("embed") / role, run.sets[role]
    errors = Ingested(run, role).table["error"]
    write_table(folder / IDS, source.table.select(["id", "uri"]).filter(errors.is_null()))
    meta = {
        "format_version": FORMAT_VERSION,
        "weights": sha256_of(run.stage("embed") / "whitening.npz"),
        "transform": {"kind": f"curation.descriptor of a {THUMB} x {THUMB} thumbnail, whitened"},
        "token": BUILT_IN,
        "parts": [[BUILT_IN, dimension]],
        "dimension": dimension,
        "normalised": True,
        "data": source.fingerprint,
        "rows": errors.null_count,
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
        embedder_of(config)


def embedder_of(config: CurateConfig) -> "BackboneEmbedder":
    from dinov2.features import BackboneEmbedder  # imported here: the descriptor does without torch
    from dinov2.models import load_backbone
    from dinov2.parallel import pick_device

    device = pick_device(config.device)
    backbone = load_backbone(config.backbone, device=device)
    size = config.embed.size or int(backbone.image_size)
    return BackboneEmbedder(
        backbone,
        size=size,
        token=config.embed.token,
        squeeze=config.embed.fit == "squeeze",
        normalised=True,
        device=device,
    )


def _embed_backbone(run: Run) -> None:
    from dinov2.features import embed  # imported here: the descriptor does without torch
    from dinov2.features.extract import embed_share

    todo = [_todo(run, role) for role in run.sets]
    embedder = embedder_of(run.config)
    options: dict[str, Any] = {
        "rows_per_file": ROWS_PER_FILE,
        "batch": run.config.embed.batch,
        "workers": run.workers.count if run.workers.count > 1 else 0,
    }
    if run.share.partial or run.share.merging:
        for role, (fresh, folder, _) in zip(run.sets, todo, strict=True):
            what = f"embed {role}"
            take = partial(run.share.take, what=what)
            if len(fresh):
                embed_share(fresh, embedder, folder, take, what=what, **options)
    run.share.leave("embed")
    for (role, source), (fresh, folder, old) in zip(run.sets.items(), todo, strict=True):
        if len(fresh):
            embed(fresh, embedder, folder, what=f"embed {role}", **options)
        if old is not None:
            readable = source.select(_readable(run, role))
            _join(readable, [old, *([folder] if len(fresh) else [])], run.stage("embed") / role)


def _todo(run: Run, role: str) -> tuple[Source, Path, Path | None]:
    """What is to be embedded of a set, into which folder, and where the others have been embedded before.

    Where some are embedded already, only what is new is, in a folder of its own.
    """
    from dinov2.features.folder import META

    readable = run.sets[role].select(_readable(run, role))
    before = run.before("embed")
    if before is None or not (before / role / META).exists():
        return readable, run.stage("embed") / role, None
    fresh = readable.select(np.flatnonzero(rows_before(run, role) < 0))
    return fresh, run.stage("embed") / f"{role}.new", before / role


def _readable(run: Run, role: str) -> NDArray[np.int64]:
    return np.flatnonzero(Ingested(run, role).table["error"].is_null().to_numpy())


def _join(source: Source, parts: list[Path], folder: Path) -> None:
    """One folder of embeddings, in the order of the source, from several."""
    from dinov2.features import Embeddings
    from dinov2.features.folder import IDS, META

    opened = [Embeddings.open(part) for part in parts]
    if len({part.meta["weights"] for part in opened}) > 1:
        raise UserError(f"the backbone has changed since {parts[0]} was made; name another output folder")
    opened.reverse()  # the new ones come first: a picture may be there with its old bytes too
    known = pa.array([name for part in opened for name in part.ids], pa.large_string())
    place = pc.index_in(source.table["id"].combine_chunks(), value_set=known).to_numpy()
    start = np.cumsum([0, *(len(part) for part in opened)])
    for number, at in enumerate(range(0, len(source), ROWS_PER_FILE)):
        wanted = place[at : at + ROWS_PER_FILE]
        rows = np.empty((len(wanted), opened[0].shape[1]), np.float16)
        for part, first, last in zip(opened, start[:-1], start[1:], strict=True):
            mine = (wanted >= first) & (wanted < last)
            rows[mine] = part[wanted[mine] - first]
        with write_whole(folder / f"{number:05d}.npy") as file:
            np.save(file, rows)
    write_table(folder / IDS, source.table.select(["id", "uri"]))
    meta = read_json(parts[-1] / META)
    write_json(folder / META, {**meta, "data": source.fingerprint, "rows": len(source)})


class Embedded:
    """The embeddings of one set, rows in the order of `Ingested.readable()`."""

    def __init__(self, run: Run, role: str) -> None:
        self._run, self._role = run, role
        self.ids = Ingested(run, role).readable()["id"].combine_chunks()

    @cached_property
    def vectors(self) -> "Embeddings":
        from dinov2.features import Embeddings  # imported here: it brings torch

        found = Embeddings.open(self._run.stage("embed") / self._role)
        if found.ids != self.ids.to_pylist():
            raise ValueError(
                f"stages/embed/{self._role} holds other pictures than stages/ingest/{self._role}"
            )
        return found
