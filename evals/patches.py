"""Patch tokens of pictures' windows: computed once where there is room, shared by the dense tasks."""

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov2.console import progress
from dinov2.exits import UserError
from dinov2.features import PRECISIONS
from dinov2.files import lock, read_json, write_json, write_whole
from evals.bench import Bench
from evals.config import EvalConfig
from evals.dense_data import DensePart
from evals.ranks import dealt
from evals.windows import Tiler, Tiling

FORMAT_VERSION = "1.0"
META = "meta.json"
PIECE = 64  # pictures whose tokens are computed by one rank, and that a killed command loses at most
Tokens = Float[Tensor, "windows patches dim"]


class PatchTokens:
    """What a backbone says of each patch of a picture's windows.

    Attributes:
        tiling: a picture's size to its windows.
        dim: of a patch: the chosen blocks' tokens one after the other, each with its CLS token if wanted.
    """

    def __init__(
        self,
        bench: Bench,
        config: EvalConfig,
        *,
        blocks: Sequence[int],
        cls: bool = False,
        whole: bool = False,
    ) -> None:
        """Args:
        blocks: indices from 0 of the blocks whose tokens are joined, each after the final norm.
        cls: join each block's CLS token to each of its patch tokens.
        whole: a picture is one window, however long it is; `size` is of its short side.

        Raises:
            UserError: the backbone's input is not RGB, or the blocks' grids differ.
        """
        self.backbone, self.config, self.bench = bench.backbone, config, bench
        patch = self.backbone.patch_size
        window = -(-config.size // patch) * patch
        self.tiling = Tiler(
            max(window, config.resize or 0), sys.maxsize // patch * patch if whole else window, patch
        )
        self.blocks, self.cls = list(blocks), cls
        if len(self.backbone.normalisation[0]) != 3:
            raise UserError("dense tasks read pictures as RGB; the backbone's input has other channels")
        self._mean, self._std = (
            torch.tensor(values, device=bench.device).view(-1, 1, 1) for values in self.backbone.normalisation
        )
        self.dim = self(torch.zeros(1, 3, window, window, dtype=torch.uint8)).shape[2]

    @property
    def meta(self) -> dict[str, Any]:
        """What tokens depend on beside the pictures."""
        return {
            "format_version": FORMAT_VERSION,
            "kind": "patch tokens of windows",
            **self.bench.identity,
            "input": [list(values) for values in self.backbone.normalisation],
            **asdict(self.tiling),
            "blocks": self.blocks,
            "cls": self.cls,
            "precision": self.config.precision,
        }

    @torch.no_grad()
    def __call__(self, windows: UInt8[Tensor, "windows 3 height width"]) -> Tokens:
        """Tokens in float32, on the bench's device, as many at once as the settings say."""
        return torch.cat([self._forward(part) for part in windows.split(self.config.batch)])

    def _forward(self, windows: Tensor) -> Tensor:
        images = (windows.to(self.bench.device).float() / 255 - self._mean) / self._std
        dtype = PRECISIONS[self.config.precision]
        with torch.autocast(self.bench.device.type, dtype, enabled=dtype != torch.float32):
            layers = self.backbone.get_intermediate_layers(images, self.blocks, return_class_token=True)
        if len({patches.shape[1] for patches, _ in layers}) > 1:
            raise UserError("the backbone's stages have grids of different sizes: take the last block alone")
        parts = [
            torch.cat([patches, cls[:, None].expand(-1, patches.shape[1], -1)], dim=2)
            if self.cls
            else patches
            for patches, cls in layers
        ]
        return torch.cat(parts, dim=2).float()


class KeptTokens:
    """The tokens of one part, on the disk where they fit, computed as they are asked for otherwise.

    They fit where the store could hold them alone. A file a picture, [windows, patches, dim] in fp16;
    `meta.json` comes last. Several ranks compute them together.
    """

    def __init__(self, tokens: PatchTokens, part: DensePart) -> None:
        self.tokens, self.part = tokens, part
        self.meta = tokens.meta | {"data": part.fingerprint}
        key = hashlib.sha256(json.dumps(self.meta, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = tokens.bench.store.hold(key) / "patches"
        self._sizes: list[tuple[int, int]] | None = None
        self.kept = self._bytes() <= tokens.bench.store.limit
        if self.kept:
            self._keep()

    def __len__(self) -> int:
        return len(self.part)

    def tiling(self, row: int) -> Tiling:
        size = self._sizes[row] if self._sizes is not None else self.part.image(row).size
        return self.tokens.tiling(size)

    def window(self, row: int, number: int) -> Float[Tensor, "patches dim"]:
        """Tokens of one window, float32 on the CPU."""
        if self.kept:
            return torch.from_numpy(self._file(row)[number].astype(np.float32))
        image = self.part.image(row)
        return self.tokens(self.tokens.tiling(image.size).cut(image)[number : number + 1])[0].cpu()

    def all(self) -> Iterator[tuple[int, Tiling, Tokens]]:
        """Row, tiling and tokens (float32, on the device) of every picture in order."""
        if not self.kept:
            yield from computed(self.tokens, self.part, range(len(self)))
            return
        for row in range(len(self)):
            array = torch.from_numpy(self._file(row).astype(np.float32))
            yield row, self.tiling(row), array.to(self.tokens.bench.device)

    def _keep(self) -> None:
        """Compute what is not there yet. Of several processes one works, and the others wait."""
        start, bench = time.perf_counter(), self.tokens.bench
        with lock(self.folder / ".lock"):
            if not (self.folder / META).exists():
                pieces = [range(first, min(first + PIECE, len(self))) for first in range(0, len(self), PIECE)]
                missing = [piece for piece in pieces if not self._whole(piece)]
                common = self.tokens.blocks, self.tokens.cls, self.part, self.folder
                known: dict[int, tuple[int, int]] = {}
                with progress(total=sum(map(len, missing)), what=f"patches of {self.part.name}") as bar:
                    for found in dealt(bench, _keep_piece, missing, *common):
                        for row, size in found:
                            known[row] = size
                            bar.update()
                # Those that a killed process had done are opened once more.
                pictures = [known.get(row) or self.part.image(row).size for row in range(len(self))]
                write_json(self.folder / META, self.meta | {"pictures": pictures})
                bench.store.trim()
            self._sizes = [tuple(size) for size in read_json(self.folder / META)["pictures"]]
        bench.seconds["features"] = bench.seconds.get("features", 0.0) + time.perf_counter() - start

    def _bytes(self) -> int:
        """About what all would take: as many windows and patches as the first picture has."""
        tiling = self.tokens.tiling(self.part.image(0).size)
        return 2 * len(self) * len(tiling.corners) * tiling.grid[0] * tiling.grid[1] * self.tokens.dim

    def _whole(self, piece: range) -> bool:
        return all(_path(self.folder, row).exists() for row in piece)

    def _file(self, row: int) -> NDArray[np.float16]:
        return np.load(_path(self.folder, row), mmap_mode="r")


def _keep_piece(
    bench: Bench, rows: range, blocks: list[int], cls: bool, part: DensePart, folder: Path
) -> Iterator[tuple[int, tuple[int, int]]]:
    """Write the tokens of some pictures; gives rows and sizes.

    Windows go through the backbone with others of their piece alone, so that their tokens are the same on
    any number of ranks, and after a kill.
    """
    tokens = PatchTokens(bench, bench.config, blocks=blocks, cls=cls)
    for row, tiling, found in computed(tokens, part, rows):
        halves = found.half().cpu().numpy()
        if not np.isfinite(halves).all():
            raise UserError("the backbone gives features that are not finite, or beyond 65,504")
        with write_whole(_path(folder, row)) as file:
            np.save(file, halves)
        yield row, tiling.picture


def computed(
    tokens: PatchTokens, part: DensePart, rows: Sequence[int]
) -> Iterator[tuple[int, Tiling, Tokens]]:
    """Row, tiling and tokens of these pictures.

    Windows of several pictures go through the backbone together, as far as they are equally large.
    """
    pending: list[tuple[int, Tiling, Tensor]] = []
    config = tokens.config
    windows = _Windows(tokens.tiling, part, rows)
    loader = DataLoader(windows, batch_size=None, num_workers=min(config.workers, len(rows)))
    for item in loader:
        if isinstance(item, UserError):
            raise item
        count = sum(len(windows) for _, _, windows in pending)
        if pending and (count >= config.batch or pending[0][1].window != item[1].window):
            yield from _together(tokens, pending)
            pending = []
        pending.append(item)
    yield from _together(tokens, pending)


def _together(
    tokens: PatchTokens, pending: list[tuple[int, Tiling, Tensor]]
) -> Iterator[tuple[int, Tiling, Tokens]]:
    if not pending:
        return
    found = tokens(torch.cat([windows for _, _, windows in pending]))
    parts = found.split([len(windows) for _, _, windows in pending])
    for (row, tiling, _), part in zip(pending, parts, strict=True):
        yield row, tiling, part


def _path(folder: Path, row: int) -> Path:
    return folder / f"{row:06d}.npy"


class _Windows(Dataset[Any]):
    """A picture's row, tiling and windows; or what is wrong with it, which an exception would lose."""

    def __init__(self, tile: Tiler, part: DensePart, rows: Sequence[int]) -> None:
        self.tile, self.part, self.rows = tile, part, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Any:
        row = self.rows[number]
        try:
            image: Image.Image = self.part.image(row)
        except UserError as error:
            return error
        tiling = self.tile(image.size)
        return row, tiling, tiling.cut(image)


def last_blocks(depth: int, count: int, *, spread: bool = False) -> list[int]:
    """Indices of the last `count` of `depth` blocks, or of as many spread evenly up to the last."""
    count = min(count, depth)
    if not spread:
        return list(range(depth - count, depth))
    return [round((number + 1) * depth / count) - 1 for number in range(count)]
