"""Random weights that make every part of a model matter."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov2.models import load_backbone
from dinov2.models.config import vit_config
from dinov2.models.vit import VisionTransformer


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> None:
    """Fill by the names' meaning: scales about 1, LayerScale too; tokens 1; positions 0.02; no bias 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("gamma", "lambda1", "gamma_1", "gamma_2")) or (
            "norm" in name and name.endswith("weight")
        ):
            parameter.copy_(1 + 0.1 * noise)
        elif "pos" in name:
            parameter.copy_(0.02 * noise)
        elif "token" in name:
            parameter.copy_(noise)
        else:
            parameter.copy_(0.05 * noise)


def small_vit(**over: object) -> VisionTransformer:
    """Three blocks of ViT-Ti with registers, patches of 8 pixels, and weights from `randomise`."""
    settings = {"patch": 8, "depth": 3, "registers": 4, "image_size": 64, **over}
    vit = VisionTransformer(vit_config("vit_tiny", **settings))
    randomise(vit)
    return vit.eval()


class CopyDetector(nn.Module):
    """As SSCD is made: a network, generalised mean, a projection, length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.network: Any = load_backbone("timm:resnet10t?seed=1").get_submodule("model")
        self.project = nn.Linear(512, 24)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.network.forward_features(images)
        pooled = maps.clamp(min=1e-6).pow(3).mean(dim=(2, 3)).pow(1 / 3)
        return nn.functional.normalize(self.project(pooled), dim=1)


def trace(model: nn.Module, path: Path, side: int) -> str:
    script: Any = torch.jit.trace(model, torch.zeros(1, 3, side, side))
    script.save(str(path))
    return str(path)
