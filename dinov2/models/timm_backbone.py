"""Any timm model as a backbone: transformers by their tokens, convolutional networks by their feature map."""

from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dinov2.exits import UserError
from dinov2.models.backbone import Backbone, Features, Images, Masks

DEFAULTS = {"in_chans": 3, "drop_path_rate": 0.0}


class TimmBackbone(Backbone):
    """A timm model that answers to the published DINOv2 interface.

    Where a model has no CLS token, the pooled features that its classifier would get stand in for it, and the
    patch tokens are its last feature map. Masks need a mask token, which timm's models do not have.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        seed: int = 0,
        channels: int = 3,
        drop_path: float = 0.0,
    ) -> None:
        """Args:
        name: as timm knows it, with or without the tag of its weights.
        pretrained: download the weights (needs a network, or timm's cache).
        seed: of the initial weights, where they are not downloaded.
        channels: of the images.
        drop_path: rate of timm's stochastic depth, which masks and saves no time.
        """
        super().__init__()
        self.name, self.channels = name, channels
        self.model = _create(name, pretrained, seed, {"in_chans": channels, "drop_path_rate": drop_path})
        self.embed_dim = int(getattr(self.model, "head_hidden_size", self.model.num_features))
        self.patch_size = int(self.model.feature_info[-1]["reduction"])
        self.image_size = int(self.model.pretrained_cfg["input_size"][-1])
        self.n_blocks = len(self.model.feature_info)
        self.normalisation = tuple(self.model.pretrained_cfg["mean"]), tuple(self.model.pretrained_cfg["std"])
        self.prefix = int(getattr(self.model, "num_prefix_tokens", 0))
        has_cls = getattr(self.model, "has_class_token", getattr(self.model, "cls_token", None) is not None)
        self.has_cls = bool(has_cls and self.prefix)
        self.num_register_tokens = self.prefix - int(self.has_cls)

    def forward_packed(
        self,
        crops: Sequence[Images],
        masks: Sequence[Masks | None] | None = None,
        generator: torch.Generator | None = None,
    ) -> list[Features]:
        """One forward for each size of crops. timm's stochastic depth draws by `generator`'s seed."""
        if masks is not None and any(mask is not None for mask in masks):
            raise UserError(f"timm:{self.name} has no mask token: switch the patch loss off")
        for images in crops:
            self._check(images)
        if not self.training or generator is None:
            return [self._features(images) for images in crops]
        device = crops[0].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(generator.initial_seed())
            return [self._features(images) for images in crops]

    def get_intermediate_layers(
        self,
        x: Images,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """As for every backbone; for a convolutional network the stages are what blocks are elsewhere."""
        indices = n if isinstance(n, int) else list(n)
        layers = []
        for features, prefix in self._intermediates(x, indices, norm)[1]:
            patches = features.contiguous() if reshape else features.flatten(2).transpose(1, 2)
            cls = prefix[:, 0] if self.has_cls else features.mean(dim=(2, 3))
            layers.append((patches, cls) if return_class_token else patches)
        return tuple(layers)

    def get_last_selfattention(self, x: Images) -> Float[Tensor, "batch heads tokens tokens"]:
        """Attention weights of the last block (by DINO's name). Tokens: CLS, registers, patches.

        Raises:
            UserError: the model has no CLS token, or no attention that timm computes step by step.
        """
        self._check(x)
        blocks = self.layers()
        inner: Any = getattr(blocks[-1], "attn", None) if blocks else None
        if not self.has_cls or not hasattr(inner, "fused_attn") or not hasattr(inner, "attn_drop"):
            raise UserError(f"timm:{self.name} has no self-attention of a CLS token to patches")
        found: list[Tensor] = []
        # What the weights go through before they meet the values, in the computation that is not fused.
        hook = inner.attn_drop.register_forward_hook(lambda _, inputs, __: found.append(inputs[0]))
        fused, inner.fused_attn = inner.fused_attn, False
        try:
            self._intermediates(x, 1, norm=False)
        finally:
            hook.remove()
            inner.fused_attn = fused
        return found[0]

    def layers(self) -> list[nn.Module]:
        """A transformer's blocks; other networks are one part."""
        blocks = getattr(self.model, "blocks", None)
        return list(blocks) if self.prefix and isinstance(blocks, nn.ModuleList | nn.Sequential) else []

    def architecture(self) -> dict[str, Any]:
        return {"kind": "timm", "name": self.name, "channels": self.channels}

    def _check(self, images: Images) -> None:
        height, width = images.shape[-2:]
        if self.prefix and (height % self.patch_size or width % self.patch_size):
            wanted = f"sides that are multiples of {self.patch_size}"
            raise UserError(f"timm:{self.name} takes {wanted}, not {height} x {width}")

    def _features(self, images: Images) -> Features:
        final, [(last, prefix)] = self._intermediates(images, 1, norm=False)
        tokens = last.flatten(2).transpose(1, 2)
        if self.prefix or final.ndim == 3:
            normed = final
            cls = normed[:, 0] if self.has_cls else self.model.forward_head(final, pre_logits=True)
        else:
            normed, cls = tokens, self.model.forward_head(final, pre_logits=True)
        return {
            "x_norm_clstoken": cls,
            "x_norm_regtokens": normed[:, int(self.has_cls) : self.prefix],
            "x_norm_patchtokens": normed[:, self.prefix :],
            "x_prenorm": torch.cat([prefix, tokens], dim=1),
            "masks": None,
        }

    def _intermediates(
        self, x: Images, indices: int | list[int], norm: bool
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The final features, and (feature map, prefix tokens) for each of the layers."""
        if self.prefix:
            options = {"return_prefix_tokens": True}
            return self.model.forward_intermediates(
                x, indices=indices, norm=norm, output_fmt="NCHW", **options
            )
        final, maps = self.model.forward_intermediates(x, indices=indices, norm=norm, output_fmt="NCHW")
        return final, [(features, features.new_empty(len(x), 0, features.shape[1])) for features in maps]


@cache
def _timm() -> Any:
    """Imported where it is needed: that takes seconds, and most runs have no model of it."""
    import dinov2.vision_ops  # noqa: F401  # for what its import does: timm imports torchvision

    import timm

    return timm


def _create(name: str, pretrained: bool, seed: int, options: dict[str, Any]) -> Any:
    timm = _timm()
    if not timm.is_model(name):
        near = get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() names all"
        raise UserError(f"timm has no model {name!r}; {hint}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return _create_for_any_size(name, pretrained, options)
        except (OSError, RuntimeError) as error:
            if not pretrained:
                raise
            raise UserError(f"the weights of timm:{name} could not be had ({_first_line(error)})") from error


def _create_for_any_size(name: str, pretrained: bool, options: dict[str, Any]) -> Any:
    timm = _timm()
    # what is at its default is left to timm, since some models do not know the option
    given: dict[str, Any] = {key: value for key, value in options.items() if value != DEFAULTS[key]}
    given["num_classes"] = 0
    try:
        return timm.create_model(name, pretrained=pretrained, dynamic_img_size=True, **given)
    except TypeError:  # only vision transformers know that option; others take any size, or their own
        pass
    try:
        return timm.create_model(name, pretrained=pretrained, **given)
    except TypeError as error:
        raise UserError(f"timm:{name} cannot be made with {given}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
