"""A backbone that takes milliseconds, and the command on it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dinov2.export import save_backbone
from dinov2.features import Embeddings
from dinov2.models.config import vit_config
from dinov2.models.vit import VisionTransformer
from evals.__main__ import main


def small_backbone(folder: Path) -> str:
    """Fresh weights, patches of 8, made for 32 pixels; returns the folder's name."""
    torch.manual_seed(0)
    vit = VisionTransformer(
        vit_config("vit_tiny", dim=48, heads=3, depth=2, patch=8, image_size=32, layer_scale=1.0)
    )
    mean, std = vit.normalisation
    save_backbone(vit, None, folder / "backbone", mean=mean, std=std, card={})
    return str(folder / "backbone")


def result_of(backbone: str, task: str, *words: str, output: Path, **settings: Any) -> dict[str, Any]:
    """Run the command in this process, and read the one result that came."""
    before = set(output.glob("results/*.json"))
    named = [f"{name}={value}" for name, value in settings.items()]
    main([backbone, task, *words, *named, f"output={output}", f"cache={output / '.cache'}"])
    (path,) = set(output.glob("results/*.json")) - before
    return json.loads(path.read_text())


def evaluated(place: Path, output: Path, *words: str, backbone: str | None = None) -> dict[str, Any]:
    """Run the command here, on the data of the fixture unless words name others, and read its result."""
    before = set(output.glob("results/*.json"))
    name = backbone or str(place / "backbone")
    settings = [f"output={output}", f"cache={place / 'cache'}"]
    if not any(word.startswith(("data=", "train=")) for word in words):
        settings.append(f"data={place / 'data'}")
    main([name, *words, *settings])
    (path,) = set(output.glob("results/*.json")) - before
    return json.loads(path.read_text())


def features_of(output: Path, result: dict[str, Any], token: str = "cls") -> dict[str, NDArray[np.float64]]:
    """What a command kept of the parts that its result names."""
    found = {}
    for part, facts in result["data"].items():
        (folder,) = [
            path.parent
            for path in output.glob(f"features/*/{token}/meta.json")
            if json.loads(path.read_text())["data"] == facts["fingerprint"]
        ]
        found[part] = np.array(Embeddings.open(folder).array(), dtype=np.float64)
    return found
