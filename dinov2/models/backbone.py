"""What every backbone answers to, whatever it is made of."""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

Images = Float[Tensor, "batch channels height width"]
Masks = Bool[Tensor, "batch patches"]
Features = dict[str, Any]  # the published names; the values are tensors, or None where there is nothing
Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel

IMAGENET: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Backbone(nn.Module):
    """Images to features, by the published DINOv2 interface.

    Attributes:
        embed_dim: width of the CLS and patch tokens.
        patch_size: pixels along a side of what one patch token stands for.
        image_size: pixels along a side of the images that it was made for.
        n_blocks: how many layers `get_intermediate_layers` can give.
        normalisation: mean and standard deviation of each channel that input in 0 to 1 is normalised with.
        value_range: the values of a file that are 0 and 1; empty for RGB of 8 bits, and where those of other
            channels fill their type's range (`dinov2.data.arrays`).
    """

    embed_dim: int
    patch_size: int
    image_size: int
    n_blocks: int
    normalisation: Normalisation = IMAGENET
    value_range: tuple[float, ...] = ()

    @abstractmethod
    def forward_packed(
        self,
        crops: Sequence[Images],
        masks: Sequence[Masks | None] | None = None,
        generator: torch.Generator | None = None,
    ) -> list[Features]:
        """Features of crops of several sizes, one dict for each size. The masked patches (True) are hidden.

        `generator` is what stochastic depth draws from, in training mode.
        """

    @abstractmethod
    def get_intermediate_layers(
        self,
        x: Images,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """Patch tokens of the last `n` blocks or of the blocks with these indices, in the blocks' order.

        Args:
            reshape: give maps [batch, dim, rows, columns] instead of sequences [batch, patches, dim].
            return_class_token: give pairs (patch tokens, CLS token).
            norm: apply the final norm to each.
        """

    def layers(self) -> list[nn.Module]:
        """The parts that are sharded, computed again and compiled one by one, each entered by calling it."""
        return []

    @abstractmethod
    def architecture(self) -> dict[str, Any]:
        """What `config.json` holds, from which `load_backbone` builds the same module."""

    def forward_features(self, x: Images | Sequence[Images], masks: Any = None) -> Any:
        """Features of one batch as a dict, or of a list of batches (with a list of masks) as a list of dicts.

        The dict holds `x_norm_clstoken` [batch, dim], `x_norm_regtokens` [batch, registers, dim],
        `x_norm_patchtokens` [batch, patches, dim], `x_prenorm` [batch, tokens, dim] and `masks`.
        """
        if isinstance(x, Tensor):
            return self.forward_packed([x], [masks])[0]
        return self.forward_packed(x, masks)

    def forward(self, x: Any, masks: Any = None, is_training: bool = False) -> Any:
        """The normalised CLS token; with `is_training`, as published, what `forward_features` gives."""
        features = self.forward_features(x, masks)
        return features if is_training else features["x_norm_clstoken"]

    def weights_hash(self) -> str:
        """The first 16 hex digits of a sha256 over all weights and buffers: names, types, shapes, bytes."""
        return weights_hash(self.state_dict())


def weights_hash(weights: dict[str, Tensor]) -> str:
    """The first 16 hex digits of a sha256 over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
