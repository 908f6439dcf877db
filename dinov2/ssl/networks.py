"""The two networks: a backbone with its heads, once as student and once as teacher."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dinov2.config import section
from dinov2.data.order import derive_seed
from dinov2.models.backbone import Backbone
from dinov2.models.config import AnyConfig
from dinov2.models.heads import DINOHead
from dinov2.models.initial import materialise
from dinov2.models.load import from_architecture, make_backbone
from dinov2.parallel import ONE_COPY, ShardingConfig, shard, whole, world


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """A projection head: MLP, bottleneck, prototypes."""

    hidden: int = 2048  # width of the MLP
    bottleneck: int = 256  # dimension of the L2-normalised output of the MLP
    prototypes: int = 65536  # K, rows of the last, weight-normalised layer
    layers: int = 3  # of the MLP
    norm_last: bool = True  # whether the last layer's rows have length one (DINO: not for ViT-S)
    weight_norm: bool = True  # false: the last layer is a plain linear one (DINOv3)
    batch_norm: bool = False  # in the MLP, before each GELU


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """One head for image and patch tokens, or one for each."""

    separate: bool = False  # a head of its own for patch tokens
    dino: HeadConfig = section(HeadConfig)
    ibot: HeadConfig = section(HeadConfig)


@dataclass(frozen=True)
class Projection:
    """What a head says of some tokens, short of their scores, which are the largest thing of a step."""

    bottleneck: Float[Tensor, "tokens dim"]
    prototypes: Float[Tensor, "prototypes dim"]

    def scores(self, rows: slice = slice(None)) -> Float[Tensor, "tokens prototypes"]:
        """The products, in the type that the head computes in."""
        return self.bottleneck[rows] @ self.prototypes.to(self.bottleneck.dtype).T


@dataclass(frozen=True)
class Projections:
    """What a network says of a batch of crops; rows crop by crop (all first views, all second views, …)."""

    cls: Float[Tensor, "crops*batch dim"]  # features before the head
    patches: Float[Tensor, "globals patches dim"]  # of the global crops
    dino: Projection  # of every crop
    ibot: Projection | None  # of the masked patches; None where there is no patch loss


class Branch(nn.Module):
    """A backbone with its heads.

    Args:
        backbone: any; stochastic depth is its own matter. Only our ViT has the mask token of the patch loss.
        heads: sizes of the heads. `ibot_head` is None where both share one.

    Attributes:
        trims: whether the last block finishes only tokens that a head sees: no other patches are used then.
    """

    trims = False

    def __init__(self, backbone: Backbone, heads: HeadsConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.dino_head = _head(backbone.embed_dim, heads.dino)
        self.ibot_head = _head(backbone.embed_dim, heads.ibot) if heads.separate else None

    def parts(self) -> list[nn.Module]:
        """Backbone and each head: what gradients are clipped by."""
        return [part for part in (self.backbone, self.dino_head, self.ibot_head) if part is not None]

    def forward(
        self,
        crops: Sequence[Float[Tensor, "_ channels height width"]],
        masked: Int[Tensor, " masked"] | None = None,
        masks: Bool[Tensor, "globals patches"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Projections:
        """All crops through the backbone as one packed sequence, then the heads.

        Args:
            crops: global crops first, then, for a student, local ones.
            masked: positions of masked patches among all patches of the global crops; None: no patch loss.
            masks: patches of the global crops that the mask token replaces; None for a teacher, who sees all.
            generator: draws stochastic depth.
        """
        looked_at: dict[str, Any] = {}
        if self.trims:
            looked_at["looked_at"] = crops[0].new_zeros(0, dtype=torch.long) if masked is None else masked
        features = self.backbone.forward_packed(
            list(crops), [masks, *[None] * (len(crops) - 1)], generator=generator, **looked_at
        )
        cls = torch.cat([group["x_norm_clstoken"] for group in features])
        patches = features[0]["x_norm_patchtokens"]
        dino = project(self.dino_head, cls)
        if masked is None:
            return Projections(cls=cls, patches=patches, dino=dino, ibot=None)
        tokens = patches.flatten(0, 1)[masked]
        if self.ibot_head is None:
            ibot = Projection(self.dino_head.bottleneck(tokens), dino.prototypes)
        else:
            ibot = project(self.ibot_head, tokens)
        return Projections(cls=cls, patches=patches, dino=dino, ibot=ibot)


def project(head: DINOHead, tokens: Float[Tensor, "tokens dim"]) -> Projection:
    """The head up to the scores. Where sharded weights leave the forward they are copied, for they vanish."""
    directions = head.prototypes.directions()
    free = directions is head.prototypes.weight and world() > 1
    return Projection(head.bottleneck(tokens), directions.clone() if free else directions)


class Headless(Branch):
    """A backbone alone, where the losses are of its vectors."""

    def __init__(self, backbone: Backbone) -> None:
        nn.Module.__init__(self)
        self.backbone = backbone

    def parts(self) -> list[nn.Module]:
        return [self.backbone]

    def forward(
        self,
        crops: Sequence[Float[Tensor, "_ channels height width"]],
        masked: Int[Tensor, " masked"] | None = None,
        masks: Bool[Tensor, "globals patches"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Projections:
        """The vectors of all crops; there is nothing that they are compared with."""
        features = self.backbone.forward_packed(list(crops), generator=generator)
        cls = torch.cat([group["x_norm_clstoken"] for group in features])
        return Projections(cls=cls, patches=cls[:0, None], dino=Projection(cls[:0], cls[:0]), ibot=None)


def whole_backbone(branch: Branch) -> Backbone:
    """The backbone with all of its weights here, whatever shards the ranks hold. All ranks call it."""
    if world() == 1:
        return branch.backbone
    weights = {name: whole(tensor) for name, tensor in branch.backbone.state_dict().items()}
    backbone = from_architecture(branch.backbone.architecture())
    for name in ("image_size", "normalisation", "value_range"):
        setattr(backbone, name, getattr(branch.backbone, name))
    backbone.load_state_dict(weights, assign=True)
    return backbone.eval().requires_grad_(False)


def make_branches(
    config: AnyConfig,
    heads: HeadsConfig | None,
    seed: int,
    device: torch.device,
    sharding: ShardingConfig = ONE_COPY,
) -> tuple[Branch, Branch]:
    """Student, and a teacher that starts equal, without stochastic depth and gradients; by the seed alone.

    Without heads where there are no settings of any.
    The teacher stays in training mode, in which batch norms see the batch, as in DINO; nothing else in it
    tells training from evaluation.
    """
    student = make_branch(config, heads, seed, device, sharding)
    return student, make_branch(config.still(), heads, seed, device, sharding).requires_grad_(False)


def make_branch(
    config: AnyConfig,
    heads: HeadsConfig | None,
    seed: int,
    device: torch.device,
    sharding: ShardingConfig = ONE_COPY,
) -> Branch:
    """A network on `device`, split over the ranks; its initial weights are a function of the seed.

    Our ViT and the heads come into being block by block, so that no rank ever holds more than its share and
    one block. Each rank draws all of a block's numbers and keeps its share: they are the same on any number
    of ranks. A model of timm's is built whole on every rank first.
    """
    backbone = make_backbone(config, seed=seed)
    with torch.device("meta"):
        branch = Headless(backbone) if heads is None else Branch(backbone, heads)
    if device.type == "cuda" and world() > 1:  # torch has no synchronised batch norm for the CPU
        nn.SyncBatchNorm.convert_sync_batchnorm(branch)
    generator = torch.Generator().manual_seed(derive_seed("weights", seed))
    prepare = partial(materialise, device=device, generator=generator)
    shard(branch, branch.backbone.layers(), device, prepare, sharding)
    return branch


def freeze_patch_loss(student: Branch) -> None:
    """Leave out of training what only the patch loss reaches.

    The optimiser would never have a state for it, and a checkpoint without one could not be loaded.
    """
    for name, parameter in student.named_parameters():
        if name.endswith("mask_token") or name.startswith("ibot_head."):
            parameter.requires_grad_(False)


def _head(dim: int, config: HeadConfig) -> DINOHead:
    return DINOHead(
        dim,
        hidden=config.hidden,
        bottleneck=config.bottleneck,
        prototypes=config.prototypes,
        layers=config.layers,
        norm_last=config.norm_last,
        batch_norm=config.batch_norm,
        weight_norm=config.weight_norm,
    )
