"""The anchor of Gram anchoring: an earlier teacher's backbone, and when it is taken (DINOv3 sec. 4)."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from dinov2.losses.gram import downsampled
from dinov2.models.backbone import Backbone
from dinov2.models.config import AnyConfig
from dinov2.models.initial import materialise
from dinov2.models.load import make_backbone
from dinov2.parallel import ONE_COPY, ShardingConfig, shard
from dinov2.ssl.networks import Branch


@dataclass(frozen=True, kw_only=True)
class GramConfig:
    """When Gram anchoring (losses.gram) sets in, and when its anchor is taken from the teacher anew."""

    start: float = 0.0  # fraction of the run at which it begins; the anchor is the teacher of that step
    warmup: float = 0.0  # fraction of the run over which its weight then rises from 0 to losses.gram
    every: int = 10000  # steps after which the anchor becomes the teacher of then
    refreshes: int = 3  # how often at most

    def share(self, step: int, steps: int) -> float:
        """Of the weight at this step; 0 before the start."""
        since = step - self.first(steps)
        if since < 0:
            return 0.0
        return min(1.0, (since + 1) / (self.warmup * steps)) if self.warmup else 1.0

    def first(self, steps: int) -> int:
        """The first step with an anchor."""
        return math.ceil(self.start * steps)

    def due(self, step: int, steps: int) -> bool:
        """Whether the anchor is taken before this step."""
        turn, left = divmod(step - self.first(steps), self.every)
        return not left and 0 <= turn <= self.refreshes


def make_anchor(config: AnyConfig, device: torch.device, sharding: ShardingConfig = ONE_COPY) -> Backbone:
    """A backbone to take the teacher's weights, split over the ranks, without gradients."""
    backbone = make_backbone(config.still())
    prepare = partial(materialise, device=device, generator=torch.Generator())
    shard(backbone, backbone.layers(), device, prepare, sharding)
    return backbone.requires_grad_(False).eval()


def take(anchor: Backbone, teacher: Branch) -> None:
    """Make the anchor what the teacher is now."""
    anchor.load_state_dict(teacher.backbone.state_dict())


@torch.no_grad()
def anchor_patches(
    anchor: Backbone,
    crops: Float[Tensor, "crops channels height width"],
    sides: tuple[int, int],
) -> Float[Tensor, "crops patches dim"]:
    """The anchor's patch features of global crops, on the grid of the student's crops.

    Args:
        crops: the student's crops, usually larger and without changes of colour.
        sides: height and width in pixels of the student's crops.
    """
    patches = anchor(crops, is_training=True)["x_norm_patchtokens"]
    rows, columns = (side // anchor.patch_size for side in crops.shape[-2:])
    height, width = (side // anchor.patch_size for side in sides)
    return downsampled(patches, (rows, columns), (height, width))
