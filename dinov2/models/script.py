"""A network of others as a TorchScript file, such as published copy detectors (SSCD): a vector a picture."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.exits import UserError
from dinov2.files import sha256_of
from dinov2.models.backbone import IMAGENET, Backbone, Features, Images, Masks, Normalisation


class ScriptBackbone(Backbone):
    """What the file gives for [batch, 3, height, width], flat, stands for the CLS token.

    There are no patch tokens and no layers to ask for. A TorchScript file is a program: open those of people
    that you trust.
    """

    model: nn.Module

    def __init__(self, path: Path, image_size: int = 224, normalisation: Normalisation = IMAGENET) -> None:
        """Raises UserError: the file cannot be read, or gives no vector for a picture of this size."""
        super().__init__()
        self.path, self._sha256 = path, sha256_of(path)
        try:
            self.model = torch.jit.load(str(path), map_location="cpu").eval()
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read as TorchScript: {str(error).strip().splitlines()[0]}"
            ) from None
        self.image_size, self.normalisation = image_size, normalisation
        self.patch_size, self.n_blocks = 1, 1
        self.embed_dim = self._tried()

    def forward_packed(
        self,
        crops: Sequence[Images],
        masks: Sequence[Masks | None] | None = None,
        generator: torch.Generator | None = None,
    ) -> list[Features]:
        if masks is not None and any(mask is not None for mask in masks):
            raise UserError(f"{self.path} is TorchScript and has no mask token")
        return [self._features(images) for images in crops]

    def get_intermediate_layers(
        self,
        x: Images,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """Raises UserError: there are none."""
        raise UserError(f"{self.path} is TorchScript: it gives one vector a picture, and no patch tokens")

    def architecture(self) -> dict[str, Any]:
        """What tells it from others; it cannot be built from that."""
        return {"kind": "torchscript", "sha256": self._sha256}

    def weights_hash(self) -> str:
        return self._sha256[:16]  # of the program too; frozen ones show no weights

    def _features(self, images: Images) -> Features:
        vectors = self.model(images)
        if not isinstance(vectors, Tensor) or len(vectors) != len(images):
            raise UserError(f"{self.path} gives no vector for each picture, as [batch, dimension]")
        vectors = vectors.flatten(1)
        none = vectors.new_empty(len(images), 0, vectors.shape[1])
        return {
            "x_norm_clstoken": vectors,
            "x_norm_regtokens": none,
            "x_norm_patchtokens": none,
            "x_prenorm": vectors[:, None],
            "masks": None,
        }

    @torch.no_grad()
    def _tried(self) -> int:
        size = self.image_size
        try:
            return self._features(torch.zeros(1, 3, size, size))["x_norm_clstoken"].shape[1]
        except (RuntimeError, IndexError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(
                f"{self.path} takes no pictures of {size} x {size}; name the side: ?image_size=… ({reason})"
            ) from None


def is_script(path: Path) -> bool:
    """Whether a file is TorchScript: a zip archive that holds code. Nothing of it is run."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.split("/")[1:2] == ["code"] for name in archive.namelist())
