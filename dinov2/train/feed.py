"""From the source to the device: which pictures a step sees, with which crops and masks."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dinov2.data.augment import MultiCrop, normalise
from dinov2.data.edits import EditedViews
from dinov2.data.fast import FastCrop
from dinov2.data.loader import Batch, batches
from dinov2.data.masks import draw_masks
from dinov2.data.mixture import Mixture, shares_by_name
from dinov2.data.on_device import changed
from dinov2.data.order import Order, SampleOrder, derive_seed
from dinov2.data.sources import Source, open_source
from dinov2.exits import UserError
from dinov2.parallel import rank, world
from dinov2.ssl.objective import Views
from dinov2.train.config import TrainConfig


@dataclass(frozen=True)
class Fed:
    """Where a step's pictures came from, and what they cost."""

    batch: Batch
    pictures: int  # on this rank
    waited: float  # seconds until the batch was there
    began: float  # when the step began, by time.perf_counter


def training_source(config: TrainConfig) -> Source:
    """The pictures to train on.

    Raises:
        UserError: there are fewer than one batch, or ranks cannot share a batch equally.
    """
    source = open_source(config.data, cache=Path(config.cache) if config.cache else None)
    if len(source) < config.batch:
        raise UserError(
            f"data={config.data} has {len(source)} pictures, too few for batch={config.batch}; "
            f"give batch={len(source)} or less, or more pictures"
        )
    if config.batch % world():
        raise UserError(f"batch={config.batch} cannot be shared equally by {world()} processes")
    if world() % config.sharding.copies:
        raise UserError(f"sharding.copies={config.sharding.copies} does not divide {world()} processes")
    if config.losses.koleo_group and world() % config.losses.koleo_group:
        raise UserError(f"losses.koleo_group={config.losses.koleo_group} does not divide {world()} processes")
    if config.batch % (world() * config.accumulate):
        raise UserError(
            f"batch={config.batch} cannot be cut into accumulate={config.accumulate} equal parts "
            f"on each of {world()} processes"
        )
    return source


def training_order(config: TrainConfig, source: Source) -> SampleOrder:
    """The order of pictures, a mixture where the settings ask for one.

    Raises:
        UserError: weights or shares that cannot be met.
    """
    seed, window = derive_seed(config.seed, "order"), config.window or None
    if not config.mix and not config.pure:
        return Order(len(source), seed, window, config.block)
    names = list(source.parts)
    weights, pure = (shares_by_name(getattr(config, key), names, key) for key in ("mix", "pure"))
    if sum(pure) > 1 + 1e-9:
        raise UserError(f"pure= sums to {sum(pure):g}: shares of the batches cannot be more than 1 together")
    if config.mix and not any(weights):
        raise UserError("mix= gives no source a weight above 0")
    for name, share in config.pure.items():
        if share and source.parts[name] < config.batch:
            raise UserError(
                f"pure.{name}: {source.parts[name]} pictures cannot fill a batch of {config.batch}"
            )
    return Mixture(
        list(source.parts.values()),
        seed,
        weights=weights if config.mix else None,
        pure=pure,
        batch=config.batch,
        window=window,
        block=config.block,
    )


def crops_of(config: TrainConfig, device: torch.device) -> MultiCrop:
    """The augmentation that the method asks for; the fast one leaves colours and blur to a GPU."""
    if config.contrasts:
        return EditedViews(config.augment, config.edits)
    if config.augment.mode == "fast":
        return FastCrop(config.augment, later=device.type == "cuda")
    return MultiCrop(config.augment)


def feed(
    config: TrainConfig,
    source: Source,
    device: torch.device,
    batch_of: Callable[[int], int],
    *,
    first: int,
    last: int,
) -> Iterator[tuple[Views, Fed]]:
    """The views of steps `first` to `last` (excluded), a function of the seed and the step alone.

    `batch_of` says which batch of the order a step takes: from `first` on, one after the other.
    """
    stream = batches(
        source,
        training_order(config, source),
        crops_of(config, device),
        seed=_augment_seed(config),
        global_batch=config.batch,
        rank=rank(),
        world=world(),
        start_step=batch_of(first),
        stop_step=batch_of(first) + last - first,
        workers=config.workers,
        pin_memory=device.type == "cuda",
    )
    began = time.perf_counter()
    for step, batch in zip(range(first, last), stream, strict=True):
        waited = time.perf_counter() - began
        yield _views(config, batch, step, device), Fed(batch, len(batch.rows), waited, began)
        began = time.perf_counter()


def step_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Draws of the student's stochastic depth at this step on this rank."""
    generator = torch.Generator(device)
    return generator.manual_seed(derive_seed(seed, "depth", step, rank()))


def _views(config: TrainConfig, batch: Batch, step: int, device: torch.device) -> Views:
    mean, std = config.augment.mean, config.augment.std
    shown = [
        normalise(crops, mean, std, torch.float32)
        for crops in _finished(config, batch, device)
        if crops is not None
    ]
    return Views(
        global_crops=shown[0],
        local_crops=shown[1] if config.augment.local_crops and not config.contrasts else None,
        masks=_masks(config, batch, step).to(device) if "ibot" in config.weights() else None,
        gram_crops=shown[2] if batch.gram_crops is not None else None,
        hidden=not config.distill,
        origins=_origins(config, batch).to(device) if config.contrasts else None,
    )


def _finished(config: TrainConfig, batch: Batch, device: torch.device) -> list[Tensor | None]:
    """Global, local and undistorted crops on the device, with the changes that were left to it."""
    crops = [batch.global_crops, batch.local_crops, batch.gram_crops]
    moved = [None if own is None else own.to(device, non_blocking=True) for own in crops]
    if batch.changes is None:
        return moved
    rows = batch.changes.split([len(batch.global_crops), len(batch.local_crops)])
    kernel = config.augment.blur_kernel
    for place, (own, changes) in enumerate(zip(moved, rows, strict=False)):
        if own is not None and len(own):
            moved[place] = changed(own, changes, kernel)
    return moved


def _augment_seed(config: TrainConfig) -> int:
    return derive_seed(config.seed, "augment")


def _origins(config: TrainConfig, batch: Batch) -> Int[Tensor, "2*batch 2"]:
    """The places in the global batch of the pictures that each view shows: two for a mixed one."""
    crop, seed = EditedViews(config.augment, config.edits), _augment_seed(config)
    own = batch.positions
    partners = [crop.partner(seed, position, config.batch) for position in own.tolist()]
    others = [mine if other is None else other for mine, other in zip(own.tolist(), partners, strict=True)]
    second = torch.stack([own, torch.tensor(others)], dim=1)
    return torch.cat([own[:, None].expand(-1, 2), second]) % config.batch


def _masks(config: TrainConfig, batch: Batch, step: int) -> Bool[Tensor, "globals patches"]:
    side = batch.global_crops.shape[-1] // config.model.patch
    if config.distill:  # the patch loss looks everywhere, and nothing is hidden
        return torch.ones(len(batch.global_crops), side * side, dtype=torch.bool)
    own = range(rank() * len(batch.rows), (rank() + 1) * len(batch.rows))
    return draw_masks(
        config.masks,
        grid=(side, side),
        crops=[view * config.batch + place for view in range(2) for place in own],
        total=2 * config.batch,
        seed=derive_seed(config.seed, "masks"),
        step=step,
    )
