"""Writes a trained backbone as a folder that `load_backbone` and people can read.

The folder holds `model.safetensors`, `config.json` (architecture, position convention, normalisation, size)
and `README.md` (a model card). Equal weights give equal bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from dinov2.exits import NoProgress
from dinov2.files import whole_folder, write_bytes, write_json, write_text
from dinov2.models.backbone import Backbone
from dinov2.models.config import ViTConfig
from dinov2.models.load import FORMAT_VERSION

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


def save_backbone(
    backbone: Backbone,
    config: ViTConfig | None,
    folder: Path | str,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    card: Mapping[str, Any],
) -> None:
    """Write `backbone` to `folder`, which appears whole and replaces what had the name before.

    Args:
        config: the architecture to state, for a ViT whose own config differs in what inference does not use
            (stochastic depth); None for the backbone's own.
        mean, std: what the input was normalised with, one value a channel.
        card: facts for the model card, in order; the values are shown as text.

    Raises:
        NoProgress: a weight is not finite. Nothing is written.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    refuse_broken(weights)
    architecture = backbone.architecture() if config is None else {"kind": "vit", **asdict(config)}
    description = {
        "format_version": FORMAT_VERSION,
        "architecture": architecture,
        "normalisation": {"mean": list(mean), "std": list(std)},
        **({"value_range": list(backbone.value_range)} if backbone.value_range else {}),
        "image_size": backbone.image_size,
        "embed_dim": backbone.embed_dim,
        "patch_size": backbone.patch_size,
    }
    with whole_folder(folder) as work:
        write_bytes(work / WEIGHTS, save(weights, metadata={"format": "pt"}))
        write_json(work / CONFIG, description)
        write_text(work / CARD, model_card(description, weights, card))


def refuse_broken(weights: Mapping[str, Tensor]) -> None:
    """Raise NoProgress if a weight is not finite, naming the first ones."""
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        named = ", ".join(broken[:3]) + (", …" if len(broken) > 3 else "")
        raise NoProgress(f"{len(broken)} weights are not finite and are not exported: {named}")


def model_card(description: dict[str, Any], weights: Mapping[str, Tensor], card: Mapping[str, Any]) -> str:
    """The README of a backbone folder: how to load it, what it is, how it was made."""
    architecture = description["architecture"]
    facts = {
        "parameters": f"{sum(tensor.numel() for tensor in weights.values()):,}",
        "image size": description["image_size"],
        "patch size": description["patch_size"],
        "embedding": description["embed_dim"],
        **{name: value for name, value in architecture.items() if name not in ("image_size", "patch")},
        "mean": description["normalisation"]["mean"],
        "std": description["normalisation"]["std"],
    }
    made = "\n".join(f"- {name}: {value}" for name, value in card.items())
    return f"""# A backbone trained by self-supervision (DINOv2)

```python
from dinov2.models import load_backbone

backbone = load_backbone("THIS_FOLDER")
backbone.forward_features(images)["x_norm_clstoken"]
backbone.get_intermediate_layers(images, n=4, reshape=True)
```
`images` is [batch, {architecture.get("channels", 3)}, height, width], height and width multiples of the patch
size. Its values lie in 0 to 1 before they are normalised with the mean and standard deviation below.

## How it was made
{made or "- not recorded"}

## What it is
| | |
|---|---|
""" + "".join(f"| {name} | {value} |\n" for name, value in facts.items())
