"""A picture as one vector, for retrieval and copy detection: framing, pooling, whitening."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from dinov2.config import listed, one_of
from dinov2.data.sources import Source
from dinov2.exits import UserError
from dinov2.features import PRECISIONS, BackboneEmbedder, Embedder, as_tensor
from dinov2.models.backbone import IMAGENET
from evals.backbones import PIXELS, PIXELS_SIDE
from evals.bench import Bench
from evals.config import EvalConfig

FITS = ("crop", "square", "longest")
LEAST_SPREAD = 1e-6  # variance of a direction that is more than rounding, as a share of the largest
Edit = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True, kw_only=True)
class DescriptorConfig(EvalConfig):
    token: str = "cls"  # what is compared: cls, mean or gem of the patches, joined by +, as in cls+gem
    fit: str = "crop"  # the centre, or the whole: as a square, or with its longest side of size pixels
    scales: list[float] = listed(1.0)  # of size, at which a picture is seen; the vectors are averaged

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.fit, FITS, "fit")
        if not self.scales or min(self.scales) <= 0:
            raise UserError(f"scales={self.scales}: give one or more above 0")
        if self.backbone == PIXELS and self.scales != [1.0]:
            raise UserError("pixels are seen at one size: leave out scales=")


@dataclass(frozen=True)
class Whole:
    """The whole picture, bicubic and antialiased: as a square, or its longest side to `size`.

    With its shape kept, sides are rounded to multiples of the patch, so that nothing is cut off.
    """

    size: int
    square: bool
    patch: int

    def __call__(self, image: Image.Image) -> UInt8[Tensor, "3 height width"]:
        return as_tensor(image.resize(self.sides(*image.size), Image.Resampling.BICUBIC))

    def sides(self, width: int, height: int) -> tuple[int, int]:
        if self.square:
            return self.size, self.size
        scale = self.size / max(width, height) / self.patch
        return max(1, round(width * scale)) * self.patch, max(1, round(height * scale)) * self.patch


class Framed:
    """Another embedder that sees its pictures whole, or edited.

    Args:
        fit: a dataclass, how the picture becomes a tensor; None for the embedder's own crop.
        edit: made before that, with a name and seed that its vectors are told apart by.
    """

    def __init__(self, embedder: Embedder, fit: Any = None, edit: Edit | None = None, **named: Any) -> None:
        self._embedder, self._fit, self._named = embedder, fit, named
        self.prepare = _Prepared(fit or embedder.prepare, edit)

    @property
    def dimension(self) -> int:
        return self._embedder.dimension

    @property
    def meta(self) -> dict[str, Any]:
        meta = self._embedder.meta
        fitted = meta["transform"]
        if self._fit is not None:
            fitted = {"kind": type(self._fit).__name__, **asdict(self._fit)}
        return meta | {"transform": fitted | self._named}

    def __call__(self, batch: Tensor) -> Float[Tensor, "n dim"]:
        return self._embedder(batch)


@dataclass(frozen=True)
class _Prepared:
    """Picklable, as the loader's workers need it."""

    fit: Callable[[Image.Image], Tensor]
    edit: Edit | None

    def __call__(self, image: Image.Image) -> Tensor:
        return self.fit(image if self.edit is None else self.edit(image))


class Describer:
    """Turns sources into vectors of length 1, by the settings of a task.

    Of several scales it is the mean of their vectors, each of length 1, made of length 1 again. On Oxford and
    Paris figures are usually of three scales, 1, 0.707 and 0.5 (arXiv 1711.02512).
    """

    def __init__(self, bench: Bench, config: DescriptorConfig) -> None:
        self.bench = bench
        self._scales = [_AtScale(bench, replace(config, size=size)) for size in _sizes(bench, config)]

    def source(
        self, source: Source, edit: Edit | None = None, **named: Any
    ) -> tuple[list[str], Float[Tensor, "n dim"]]:
        """Ids and vectors of the readable pictures, in order; of edited ones where there is an edit."""
        ids, first = self._scales[0].source(source, edit, **named)
        others = [scale.source(source, edit, **named) for scale in self._scales[1:]]
        if any(found != ids for found, _ in others):
            raise UserError(f"pictures of {source.name} changed meanwhile; run it again")
        return ids, _joined([first, *(vectors for _, vectors in others)])

    def picture(self, image: Image.Image) -> Float[Tensor, "dim"]:
        """Of one picture in memory."""
        return _joined([scale.picture(image) for scale in self._scales])


class _AtScale:
    """The same at one size."""

    def __init__(self, bench: Bench, config: DescriptorConfig) -> None:
        self.bench, self.config = bench, config
        self._plain, self._whole = _plain(bench, config), _whole(bench, config)
        self._batch = 1 if self._whole and not self._whole.square else None  # such pictures differ in size

    def source(
        self, source: Source, edit: Edit | None = None, **named: Any
    ) -> tuple[list[str], Float[Tensor, "n dim"]]:
        if self._whole is None and edit is None:
            ids, vectors = self.bench.vectors(source, self.config.token, self.config.size)
        else:
            embedder = Framed(self._plain, self._whole, edit, **named)
            found = self.bench.embedded(source, embedder, batch=self._batch)
            parts = embedder.meta["parts"]
            ids = found.ids
            vectors = np.array(found.array()[:, found.columns(parts[0][0], parts[-1][0])])
        return ids, unit(torch.from_numpy(vectors))

    def picture(self, image: Image.Image) -> Float[Tensor, "dim"]:
        framed = Framed(self._plain, self._whole)
        vector = framed(framed.prepare(image)[None]).cpu()
        return unit(vector.half())[0]  # as rounded as those that lie in the cache


def unit(vectors: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
    return torch.nn.functional.normalize(vectors.float(), dim=-1)


def _joined(vectors: Sequence[Float[Tensor, "*n dim"]]) -> Float[Tensor, "*n dim"]:
    return vectors[0] if len(vectors) == 1 else unit(torch.stack([*vectors]).mean(0))


def _sizes(bench: Bench, config: DescriptorConfig) -> list[int]:
    """Pixels at each scale; others than those asked for are brought to whole patches."""
    if config.scales == [1.0]:
        return [config.size]
    patch = bench.backbone.patch_size
    return [
        config.size if scale == 1 else max(1, round(config.size * scale / patch)) * patch
        for scale in config.scales
    ]


@dataclass(frozen=True)
class Whitening:
    """Principal components with equal variance, and then length 1 (Jégou and Chum, ECCV 2012)."""

    mean: Float[Tensor, "dim"]
    projection: Float[Tensor, "dim kept"]

    @classmethod
    def learnt(cls, rows: Float[Tensor, "n dim"], kept: int | None = None) -> "Whitening":
        """From L2-normalised rows of pictures that have nothing to do with those compared.

        Args:
            kept: directions; None for all that the rows spread in.

        Raises:
            UserError: there are too few rows, or they spread in fewer directions than are to be kept.
        """
        most = min(len(rows) - 1, rows.shape[1])
        if most < 1 or (kept or 0) > most:
            raise UserError(
                f"whiten={kept}: {len(rows):,} vectors of {rows.shape[1]} give {max(most, 0)} directions"
            )
        exact = rows.double()
        mean = exact.mean(0)
        values, directions = torch.linalg.eigh(torch.cov((exact - mean).T))
        values, directions = values.flip(0), directions.flip(1)
        spread = int((values[:most] > LEAST_SPREAD * values[0]).sum())
        if (kept or 1) > spread:
            raise UserError(f"whiten={kept}: the vectors spread in {spread} directions; keep fewer")
        kept = kept or spread
        values, directions = values[:kept], directions[:, :kept]
        return cls(mean.float(), (directions / values.sqrt()).float())

    def __call__(self, rows: Float[Tensor, "n dim"]) -> Float[Tensor, "n kept"]:
        return unit((rows - self.mean) @ self.projection)


def _whole(bench: Bench, config: DescriptorConfig) -> Whole | None:
    if config.fit == "crop":
        return None
    if config.backbone == PIXELS:
        return Whole(PIXELS_SIDE, True, 1)
    square, patch = config.fit == "square", bench.backbone.patch_size
    if square and config.size % patch:
        raise UserError(f"size={config.size} does not divide into the backbone's patches of {patch}")
    return Whole(config.size, square, patch)


def _plain(bench: Bench, config: DescriptorConfig) -> Embedder:
    """What makes vectors of tensors; how it would crop is not used where pictures are seen whole."""
    if config.fit == "crop" or config.backbone == PIXELS:
        return bench.embedder(config.token, config.size)
    backbone = bench.backbone
    if len(backbone.normalisation[0]) != len(IMAGENET[0]) or backbone.value_range:
        raise UserError(f"fit={config.fit} is for pictures of 8 bits and three channels; leave it at crop")
    size = max(1, config.size // backbone.patch_size) * backbone.patch_size
    return BackboneEmbedder(
        backbone,
        size=size,
        resize=size,
        token=config.token,
        device=bench.device,
        dtype=PRECISIONS[config.precision],
    )
