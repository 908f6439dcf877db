"""Embeds a source: into a folder, piece by piece so that a killed run continues, or into memory."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dinov2.console import progress
from dinov2.data.decode import Unreadable, decode
from dinov2.data.sources import Source
from dinov2.exits import UserError
from dinov2.features.embedder import DeepCentreCrop, Embedder
from dinov2.features.folder import FORMAT_VERSION, IDS, META, Embeddings
from dinov2.files import lock, read_json, remove_leftovers, write_json, write_table, write_whole

PARTIAL = ".partial"  # what is known of an unfinished folder: its meta, and what each piece left out
Failure = tuple[int, str]  # row of the source, reason


def embed(
    source: Source,
    embedder: Embedder,
    folder: Path | str,
    *,
    rows_per_file: int = 8192,
    batch: int = 64,
    workers: int = 0,
    at_least: int | None = None,
    what: str = "embed",
    others: Callable[[Sequence[int]], None] | None = None,
) -> Embeddings:
    """Embed every picture of a source into a folder; rows keep the source's order.

    What is done already stays; what a killed process left unfinished is continued with the next file. Of
    several processes that embed into one folder, one works and the others wait for it. Pictures that cannot
    be read are left out and named in the meta under `unreadable`, as [id, uri, reason].

    Args:
        at_least: decode JPEGs at a reduced scale whose short side keeps this many pixels (faster, not equal).
        others: makes the pieces of these numbers instead, as by `embed_pieces` in several processes.

    Raises:
        UserError: the folder was made from other data or in another way; no picture can be read; a vector is
            not finite.
    """
    folder = Path(folder)
    meta = _meta(source, embedder, rows_per_file, at_least)
    with lock(folder / ".embed.lock"):
        _check_same(folder, meta)
        if not (folder / META).exists():
            write_json(folder / PARTIAL / META, meta)
            remove_leftovers(folder)
            pieces = range(-(-len(source) // rows_per_file))
            missing = [number for number in pieces if not _done(folder, number).exists()]
            if others is not None:
                others(missing)
            else:
                embed_pieces(
                    source,
                    embedder,
                    folder,
                    missing,
                    rows_per_file=rows_per_file,
                    batch=batch,
                    workers=workers,
                    at_least=at_least,
                    what=what,
                )
            _finish(folder, source, meta)
    return Embeddings.open(folder)


def embed_share(
    source: Source,
    embedder: Embedder,
    folder: Path,
    take: Callable[[int, Callable[[int], bool]], Sequence[int]],
    *,
    rows_per_file: int = 8192,
    batch: int = 64,
    workers: int = 0,
    what: str = "embed",
) -> None:
    """Make some pieces of a folder that several processes fill at once; `embed` ends it when all are there.

    Args:
        take: gives the numbers of the pieces to make, of so many, when told which are done.

    Raises:
        UserError: as `embed`.
    """
    meta = _meta(source, embedder, rows_per_file, None)
    with lock(folder / ".embed.lock"):
        _check_same(folder, meta)
        whole = (folder / META).exists()
        if not whole:
            write_json(folder / PARTIAL / META, meta)
    count = -(-len(source) // rows_per_file)
    numbers = take(count, lambda number: whole or _done(folder, number).exists())
    embed_pieces(
        source,
        embedder,
        folder,
        numbers,
        rows_per_file=rows_per_file,
        batch=batch,
        workers=workers,
        what=what,
    )


def _meta(source: Source, embedder: Embedder, rows_per_file: int, at_least: int | None) -> dict[str, Any]:
    meta = embedder.meta | {
        "format_version": FORMAT_VERSION,
        "dimension": embedder.dimension,
        "data": source.fingerprint,
        "rows_per_file": rows_per_file,
        "at_least": at_least,
    }
    return json.loads(json.dumps(meta))  # as it will be read again: tuples are lists


def embed_array(
    source: Source, embedder: Embedder, *, batch: int = 64, workers: int = 0
) -> tuple[list[str], Float[Tensor, "n dim"]]:
    """Ids and float32 vectors of the readable pictures of a source, in its order, in memory, on the CPU."""
    kept: list[int] = []
    vectors = [torch.zeros(0, embedder.dimension)]
    for loaded in _loaded(source, embedder.prepare, _batches(range(len(source)), batch), workers):
        vectors.append(_vectors(loaded, embedder).cpu())
        kept += loaded.rows
    ids = source.table["id"].take(pa.array(kept, pa.int64())).to_pylist()
    return ids, torch.cat(vectors)


@dataclass
class _Loaded:
    """A batch of prepared pictures of these rows, and the rows of those that could not be read."""

    rows: list[int]
    pictures: Tensor | None
    failures: list[Failure]


class _Pictures(Dataset[Any]):
    """A row to (row, prepared picture), or to (row, reason) where it cannot be read."""

    def __init__(
        self, source: Source, prepare: Callable[[Image.Image], Tensor], at_least: int | None
    ) -> None:
        self.source, self.prepare, self.at_least = source, prepare, at_least

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> tuple[int, Tensor | str]:
        try:
            data = self.source.read(row)
            if isinstance(self.prepare, DeepCentreCrop):
                return row, self.prepare(self.prepare.open(data))
            return row, self.prepare(decode(data, at_least=self.at_least))
        except Unreadable as error:
            return row, str(error)


def stacked(pictures: Sequence[Tensor]) -> Tensor:
    """Equal tensors on the CPU as one, by NumPy: torch would start its threads, which may all be busy."""
    return torch.from_numpy(np.stack([picture.numpy() for picture in pictures]))


def _together(items: list[tuple[int, Tensor | str]]) -> _Loaded:
    pictures = [picture for _, picture in items if isinstance(picture, Tensor)]
    return _Loaded(
        rows=[row for row, picture in items if isinstance(picture, Tensor)],
        pictures=stacked(pictures) if pictures else None,
        failures=[(row, reason) for row, reason in items if isinstance(reason, str)],
    )


class _AsLists(Sampler[list[int]]):
    """Batches as the loader wants them. Ranges cost nothing where a source has 100 million rows."""

    def __init__(self, batches: list[range]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return map(list, self.batches)


def _batches(rows: range, batch: int) -> list[range]:
    return [rows[start : start + batch] for start in range(0, len(rows), batch)]


def _loaded(
    source: Source,
    prepare: Callable[[Image.Image], Tensor],
    batches: list[range],
    workers: int,
    at_least: int | None = None,
) -> Iterator[_Loaded]:
    return iter(
        DataLoader(
            _Pictures(source, prepare, at_least),
            batch_sampler=_AsLists(batches),
            num_workers=min(workers, len(batches)),
            collate_fn=_together,
            pin_memory=torch.cuda.is_available(),
        )
    )


def _vectors(loaded: _Loaded, embedder: Embedder) -> Tensor:
    if loaded.pictures is None:
        return torch.zeros(0, embedder.dimension)
    return embedder(loaded.pictures).float()


def _check_same(folder: Path, meta: dict[str, Any]) -> None:
    """Refuse a folder that was made from something else: its rows would be mixed with ours."""
    for path in (folder / META, folder / PARTIAL / META):
        if not path.exists():
            continue
        there = read_json(path)
        if differing := [key for key in meta if there.get(key) != meta[key]]:
            raise UserError(
                f"{folder} holds other embeddings ({', '.join(differing)} differ); name another folder"
            )


def embed_pieces(
    source: Source,
    embedder: Embedder,
    folder: Path,
    numbers: Sequence[int],
    *,
    rows_per_file: int = 8192,
    batch: int = 64,
    workers: int = 0,
    at_least: int | None = None,
    what: str = "embed",
    shown: bool = True,
) -> None:
    """Write the pieces of these numbers, for whoever holds the folder in `embed`.

    Batches never span pieces, so that a piece is always the same.
    """
    pieces = _batches(range(len(source)), rows_per_file)
    todo = [_batches(pieces[number], batch) for number in numbers]
    loader = _loaded(source, embedder.prepare, [part for parts in todo for part in parts], workers, at_least)
    before = len(source) - sum(len(pieces[number]) for number in numbers)
    with progress(total=len(source), what=what, initial=before, shown=shown) as bar:
        for number, parts in zip(numbers, todo, strict=True):
            rows, failures = [], []
            for part in parts:
                loaded = next(loader)
                rows.append(_as_fp16(_vectors(loaded, embedder)))
                failures += [[row, reason] for row, reason in loaded.failures]
                bar.update(len(part))
            with write_whole(folder / f"{number:05d}.npy") as file:
                np.save(file, np.concatenate(rows))
            write_json(_done(folder, number), failures)


def _as_fp16(vectors: Tensor) -> np.ndarray:
    halves = vectors.half()
    if not torch.isfinite(halves).all():
        raise UserError(
            "the backbone gives features that are not finite, or beyond 65,504: its weights are broken"
        )
    return halves.cpu().numpy()


def _done(folder: Path, number: int) -> Path:
    return folder / PARTIAL / f"{number:05d}.json"


def _finish(folder: Path, source: Source, meta: dict[str, Any]) -> None:
    """Write the ids and, at last, the meta, with which the folder is whole."""
    paths = sorted((folder / PARTIAL).glob("[0-9]*.json"))
    failures = {row: reason for path in paths for row, reason in read_json(path)}
    kept = np.setdiff1d(np.arange(len(source)), np.array(sorted(failures), dtype=np.int64))
    if not len(kept):
        reason = next(iter(failures.values()))
        raise UserError(f"none of the {len(source):,} pictures of {source.name} can be read: {reason}")
    named = source.table.select(["id", "uri"])
    write_table(folder / IDS, named.take(pa.array(kept)))
    unreadable = named.take(pa.array(sorted(failures), pa.int64())).to_pylist()
    meta = meta | {
        "rows": len(kept),
        "unreadable": [
            [picture["id"], picture["uri"], failures[row]]
            for row, picture in zip(sorted(failures), unreadable, strict=True)
        ],
    }
    write_json(folder / META, meta)
    shutil.rmtree(folder / PARTIAL)
