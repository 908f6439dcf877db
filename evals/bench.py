"""What a task is given: the backbone, and features that are computed once and shared by all tasks."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinov2.data.sources import Source
from dinov2.features import Embedder, Embeddings, embed, embed_pieces
from dinov2.files import read_json
from dinov2.models.backbone import Backbone
from dinov2.parallel import is_main, pick_device, world
from evals.backbones import PIXELS, embedder, load
from evals.config import EvalConfig
from evals.ranks import dealt
from evals.store import Store

FEATURES = "features"
PIECE = 1024  # pictures that are embedded by one rank, and that a killed command loses at most


class Bench:
    """One backbone under evaluation, in one output folder.

    Attributes:
        device: where it all runs.
        seconds: what was spent, by what it was spent on.
        store: where features are kept; a task that keeps some there itself holds their folder.
        unreadable: by a source's fingerprint, how many of its pictures could not be read.
    """

    def __init__(self, config: EvalConfig) -> None:
        self.config, self.folder = config, Path(config.output)
        self.device = pick_device(config.device)
        self.seconds: dict[str, float] = {}
        self.unreadable: dict[str, int] = {}
        self.store = Store(self.folder / FEATURES, config.features_gib)
        self._embedders: dict[tuple[str, int, int | None], Embedder] = {}

    @cached_property
    def backbone(self) -> Backbone:
        """Raises UserError for `pixels`, which has no tokens to train on."""
        return load(self.config.backbone, self.device)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What distinguishes this backbone from any other: weights and architecture, not where it lies."""
        if self.config.backbone == PIXELS:
            return {"weights": PIXELS}
        return {"weights": self.backbone.weights_hash(), "architecture": self.backbone.architecture()}

    def embedder(self, token: str, size: int | None = None, resize: int | None = None) -> Embedder:
        """What embeds pictures of `size` pixels, the settings' own by default.

        `resize` is the short side before the crop; by default that of the settings, in proportion.
        """
        config, size = self.config, size or self.config.size
        if resize is None:
            resize = config.resize and round(config.resize * size / config.size)
        key = (token, size, resize)
        if key not in self._embedders:
            backbone = None if config.backbone == PIXELS else self.backbone
            config = replace(config, size=size, resize=resize)
            self._embedders[key] = embedder(backbone, config, token, self.device)
        return self._embedders[key]

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count the seconds of a block as spent on `what`, without those of features had in it."""
        start, before = time.perf_counter(), self.seconds.get("features", 0.0)
        yield
        spent = time.perf_counter() - start - (self.seconds.get("features", 0.0) - before)
        self.seconds[what] = self.seconds.get(what, 0.0) + spent

    def features(self, source: Source, token: str = "cls", size: int | None = None) -> Embeddings:
        """Features of a source, from the cache where they are there, whichever task put them there.

        There may be more in a vector than was asked for: take the columns of the token's parts.
        """

        def on_ranks(folder: Path, missing: Sequence[int]) -> None:
            shares = [list(missing[first :: world()]) for first in range(world())]
            for _ in dealt(self, _embed_share, shares, source, token, size, folder):
                pass

        return self.embedded(source, self.embedder(token, size), others=on_ranks if world() > 1 else None)

    def embedded(
        self,
        source: Source,
        wanted: Embedder,
        *,
        batch: int | None = None,
        others: Callable[[Path, Sequence[int]], None] | None = None,
    ) -> Embeddings:
        """The same by a task's own embedder; `batch` where pictures of several sizes cannot be stacked.

        `others` writes the missing pieces into a folder instead: see `embed`.
        """
        start = time.perf_counter()
        held = self.store.hold(_key(wanted.meta, source))
        found = _wide_enough(held, wanted.meta["parts"])
        if found is None:
            folder = held / wanted.meta["token"]
            found = embed(
                source,
                wanted,
                folder,
                rows_per_file=PIECE,
                batch=batch or self.config.batch,
                workers=self.config.workers,
                what=f"features of {source.name}",
                others=None if others is None else lambda missing: others(folder, missing),
            )
            self.store.trim()
        self.unreadable[source.fingerprint] = len(found.meta["unreadable"])
        self.seconds["features"] = self.seconds.get("features", 0.0) + time.perf_counter() - start
        return found

    def vectors(
        self, source: Source, token: str = "cls", size: int | None = None
    ) -> tuple[list[str], NDArray[np.float16]]:
        """Ids, and features of just this token, [n, dim], in memory."""
        found = self.features(source, token, size)
        parts = self.embedder(token, size).meta["parts"]
        return found.ids, np.array(found.array()[:, found.columns(parts[0][0], parts[-1][0])])


def _embed_share(
    bench: Bench, numbers: list[int], source: Source, token: str, size: int | None, folder: Path
) -> None:
    """One rank's pieces."""
    embed_pieces(
        source,
        bench.embedder(token, size),
        folder,
        numbers,
        rows_per_file=PIECE,
        batch=bench.config.batch,
        workers=bench.config.workers,
        what=f"features of {source.name}",
        shown=is_main(),
    )


def _key(meta: dict[str, Any], source: Source) -> str:
    """Features in one folder differ only in which tokens they are of."""
    rest = {name: value for name, value in meta.items() if name not in ("token", "parts")}
    text = json.dumps([rest, source.fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _wide_enough(folder: Path, parts: list[list[Any]]) -> Embeddings | None:
    """Finished features that hold these parts one after the other."""
    for path in sorted(folder.glob("*/meta.json")):
        there = read_json(path)["parts"]
        if any(there[first : first + len(parts)] == parts for first in range(len(there))):
            return Embeddings.open(path.parent)
    return None
