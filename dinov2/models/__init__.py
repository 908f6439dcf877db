"""Backbones: our ViT, others through timm, and the reading of their weights.

`load_backbone(spec)` is the way in for everything that only uses a trained backbone.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinov2.models.load import load_backbone

__all__ = ["load_backbone"]


def __getattr__(name: str) -> Any:
    """Import torch only when a backbone is asked for, so that reading a config stays quick."""
    if name != "load_backbone":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dinov2.models.load import load_backbone

    return load_backbone
