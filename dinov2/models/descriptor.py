"""A backbone whose vector is a descriptor: pooled features, projected, of length 1 (SSCD).

Pizzi et al., "A Self-Supervised Descriptor for Image Copy Detection", arXiv 2202.10261, sec. 4.2.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from dinov2.models.backbone import Backbone, Features, Images, Masks

GEM_POWER = 3.0


class DescriptorBackbone(Backbone):
    """Any backbone, with its CLS token replaced by a descriptor; `embed_dim` is the descriptor's.

    Patch tokens are the inner backbone's, of its own width. There is one layer to ask for: the last.
    """

    def __init__(self, inner: Backbone, dimension: int, pooling: str) -> None:
        """Args:
        pooling: of what the descriptor is a projection: `cls`; `mean` of the patch tokens; `gem`, their
            generalised mean of power 3 (Radenović et al. 2018), for features that are not negative, such
            as a convolutional network's.
        """
        super().__init__()
        self.inner, self.pooling = inner, pooling
        self.project = nn.Linear(inner.embed_dim, dimension)
        self.embed_dim, self.n_blocks = dimension, 1
        self.patch_size, self.image_size = inner.patch_size, inner.image_size
        self.normalisation = inner.normalisation

    def layers(self) -> list[nn.Module]:
        return self.inner.layers()

    def forward_packed(
        self,
        crops: Sequence[Images],
        masks: Sequence[Masks | None] | None = None,
        generator: torch.Generator | None = None,
    ) -> list[Features]:
        features = self.inner.forward_packed(crops, masks, generator)
        return [one | {"x_norm_clstoken": self.describe(one)} for one in features]

    def describe(self, features: Features) -> Float[Tensor, "batch dim"]:
        """The descriptor, float32, from what the inner backbone gives."""
        if self.pooling == "cls":
            pooled = features["x_norm_clstoken"]
        else:
            patches = features["x_norm_patchtokens"].float()
            power = GEM_POWER if self.pooling == "gem" else 1.0
            pooled = (
                patches.clamp(min=1e-6).pow(power).mean(dim=1).pow(1 / power)
                if power > 1
                else patches.mean(1)
            )
        return functional.normalize(self.project(pooled).float(), dim=1)

    def get_intermediate_layers(
        self,
        x: Images,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """Patch tokens of the inner backbone; with `return_class_token`, the descriptor beside each."""
        patches = self.inner.get_intermediate_layers(x, n, reshape=reshape, norm=norm)
        if not return_class_token:
            return patches
        descriptor = self.forward_features(x)["x_norm_clstoken"]
        return tuple((layer, descriptor) for layer in patches)

    def architecture(self) -> dict[str, Any]:
        inner = self.inner.architecture()
        return {"kind": "descriptor", "inner": inner, "dimension": self.embed_dim, "pooling": self.pooling}
