"""The two networks: a backbone with its heads, once as student and once as teacher."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dinov2.config import section
from dinov2.models.config import ViTConfig
from dinov2.models.heads import DINOHead
from dinov2.models.vit import VisionTransformer
from dinov2.parallel import whole, world


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """A projection head: MLP, bottleneck, prototypes."""

    hidden: int = 2048  # width of the MLP
    bottleneck: int = 256  # dimension of the L2-normalised output of the MLP
    prototypes: int = 65536  # K, rows of the last, weight-normalised layer
    layers: int = 3  # of the MLP
    norm_last: bool = True  # whether the last layer's rows have length one (DINO: not for ViT-S)


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """One head for image and patch tokens, or one for each."""

    separate: bool = False  # a head of its own for patch tokens
    dino: HeadConfig = section(HeadConfig)
    ibot: HeadConfig = section(HeadConfig)


@dataclass(frozen=True)
class Scores:
    """What a network says of a batch of crops; rows crop by crop (all first views, all second views, …)."""

    cls: Float[Tensor, "crops*batch dim"]  # features before the head
    dino: Float[Tensor, "crops*batch prototypes"]
    ibot: Float[Tensor, "masked prototypes"]


class Branch(nn.Module):
    """A backbone with its heads.

    Args:
        backbone: the ViT; stochastic depth is its own matter.
        heads: sizes of the heads. `ibot_head` is None where both share one.
    """

    def __init__(self, backbone: VisionTransformer, heads: HeadsConfig) -> None:
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
        masked: Int[Tensor, " masked"],
        masks: Bool[Tensor, "globals patches"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Scores:
        """All crops through the backbone as one packed sequence, then the heads.

        Args:
            crops: global crops first, then, for a student, local ones.
            masked: positions of masked patches among all patches of the global crops.
            masks: patches of the global crops that the mask token replaces; None for a teacher, who sees all.
            generator: draws stochastic depth.
        """
        features = self.backbone.forward_packed(
            list(crops), [masks, *[None] * (len(crops) - 1)], generator=generator
        )
        cls = torch.cat([group["x_norm_clstoken"] for group in features])
        patches = features[0]["x_norm_patchtokens"].flatten(0, 1)[masked]
        return Scores(cls=cls, dino=self.dino_head(cls), ibot=(self.ibot_head or self.dino_head)(patches))


def whole_backbone(branch: Branch) -> VisionTransformer:
    """The backbone with all of its weights here, whatever shards the ranks hold. All ranks call it."""
    if world() == 1:
        return branch.backbone
    weights = {name: whole(tensor) for name, tensor in branch.backbone.state_dict().items()}
    with torch.device("meta"):
        backbone = VisionTransformer(branch.backbone.config)
    backbone.load_state_dict(weights, assign=True)
    return backbone.eval().requires_grad_(False)


def make_branches(vit: ViTConfig, heads: HeadsConfig, seed: int) -> tuple[Branch, Branch]:
    """Student, and a teacher that starts equal, without stochastic depth and gradients; by the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = Branch(VisionTransformer(vit), heads)
        teacher = Branch(VisionTransformer(replace(vit, drop_path=0.0)), heads)
    teacher.load_state_dict(student.state_dict())
    return student, teacher.requires_grad_(False).eval()


def _head(dim: int, config: HeadConfig) -> DINOHead:
    return DINOHead(
        dim,
        hidden=config.hidden,
        bottleneck=config.bottleneck,
        prototypes=config.prototypes,
        layers=config.layers,
        norm_last=config.norm_last,
    )
