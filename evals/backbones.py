"""What is evaluated: a backbone, the same with fresh weights, or no backbone at all (raw pixels)."""

from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dinov2.exits import UserError
from dinov2.features import PRECISIONS, BackboneEmbedder, CentreCrop, Embedder, as_tensor
from dinov2.models import load_backbone
from dinov2.models.backbone import IMAGENET, Backbone
from dinov2.models.timm_backbone import TimmBackbone
from dinov2.models.vit import VisionTransformer
from evals.config import EvalConfig

PIXELS = "pixels"  # raw pixels: what recognition is possible without any backbone
UNTRAINED = "untrained:"  # `untrained:SPEC?seed=1`: the architecture of SPEC with fresh weights
PIXELS_SIDE = 32


class Pixels:
    """The picture itself as a vector of length 1: cut as for a backbone, reduced to 32 x 32, normalised."""

    dimension = 3 * PIXELS_SIDE**2

    def __init__(self, size: int = 224, resize: int | None = None) -> None:
        self.crop = CentreCrop(size, round(size * 256 / 224) if resize is None else resize)

    @property
    def meta(self) -> dict[str, Any]:
        transform = {"kind": "centre crop", **asdict(self.crop), "then": PIXELS_SIDE}
        return {
            "weights": PIXELS,
            "transform": transform,
            "token": "cls",
            "parts": [["cls-1", self.dimension]],
        }

    def prepare(self, image: Image.Image) -> Tensor:
        return as_tensor(self.crop.picture(image).resize((PIXELS_SIDE, PIXELS_SIDE), Image.Resampling.BOX))

    def __call__(self, batch: Tensor) -> Float[Tensor, "n dim"]:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
        return torch.nn.functional.normalize(((batch / 255 - mean) / std).flatten(1), dim=1)


def load(spec: str, device: torch.device | str) -> Backbone:
    """`load_backbone`, and `untrained:SPEC` with `seed=N` among its options."""
    if spec == PIXELS:
        raise UserError("pixels is no backbone: it serves as a baseline for tasks on vectors, such as knn")
    if not spec.startswith(UNTRAINED):
        return load_backbone(spec, device=device)
    location, _, text = spec.removeprefix(UNTRAINED).partition("?")
    words = [word for word in text.split("&") if word]
    seeds = [word.removeprefix("seed=") for word in words if word.startswith("seed=")]
    rest = "&".join(word for word in words if not word.startswith("seed="))
    if len(seeds) > 1 or not all(seed.isdecimal() for seed in seeds):
        raise UserError(f"{spec}: the seed is one number, as in untrained:FOLDER?seed=1")
    backbone = load_backbone(location + ("?" + rest if rest else ""), device="cpu")
    return _fresh(backbone, int(seeds[0]) if seeds else 0).to(device)


def embedder(backbone: Backbone | None, config: EvalConfig, token: str, device: torch.device) -> Embedder:
    """The embedder of a backbone, or of pixels where there is none."""
    if backbone is None:
        if token != "cls":
            raise UserError(f"pixels has no tokens: leave out token={token}")
        return Pixels(config.size, config.resize)
    return BackboneEmbedder(
        backbone,
        size=config.size,
        resize=config.resize,
        token=token,
        device=device,
        dtype=PRECISIONS[config.precision],
    )


def _fresh(backbone: Backbone, seed: int) -> Backbone:
    if isinstance(backbone, VisionTransformer):
        backbone.init_weights(torch.Generator().manual_seed(seed))
        return backbone
    if not isinstance(backbone, TimmBackbone):
        raise UserError(f"untrained: does not know how to renew a {type(backbone).__name__}")
    fresh = TimmBackbone(backbone.name, seed=seed).eval().requires_grad_(False)
    fresh.normalisation, fresh.image_size = backbone.normalisation, backbone.image_size
    return fresh
