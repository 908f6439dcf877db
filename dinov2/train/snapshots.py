"""What the teacher sees in a few fixed pictures through a run: its attention, and patches as colours."""

from pathlib import Path

import torch
from PIL import Image

from dinov2.data.decode import Unreadable, decode
from dinov2.data.sources import Source
from dinov2.exits import UserError
from dinov2.files import whole_folder
from dinov2.models.vit import VisionTransformer
from dinov2.parallel import is_main
from dinov2.pictures import attention_maps, patch_colours
from dinov2.ssl.networks import whole_backbone
from dinov2.train.config import TrainConfig
from dinov2.train.state import State

SIDE = 224  # pixels of the short side of what is kept
TRIED = 16


class Snapshots:
    """`snapshots/00000100/N-attention.png` and `N-patches.png` for pictures N spread over the source.

    The attention is the mean over the heads of the last block's CLS token (DINO, sec. 4.2.2); the colours are
    the first three principal components of the patch tokens of all the pictures (DINOv2, sec. 7.5). Both are
    of the whole picture at the size that the backbone is trained at. Only for our own ViTs of three channels.
    """

    def __init__(self, config: TrainConfig, folder: Path, source: Source, steps: int) -> None:
        self.folder, self.source = folder / "snapshots", source
        count = config.watch.snapshots if config.model.is_vit and config.model.channels == 3 else 0
        self.steps = {round(steps * place / max(count - 1, 1)) for place in range(count)}
        count = min(config.watch.pictures, len(source))
        self.rows = [place * len(source) // count for place in range(count)]

    def take(self, state: State) -> None:
        """Draw the pictures if it is time; all ranks call it."""
        if state.step not in self.steps or not self.rows:
            return
        backbone = whole_backbone(state.teacher)
        if not is_main() or not isinstance(backbone, VisionTransformer):
            return
        pictures = [_shown(self.source, row) for row in self.rows]
        with whole_folder(self.folder / f"{state.step:08d}") as work, torch.no_grad():
            colours = patch_colours(backbone, pictures)
            for place, (picture, colour) in enumerate(zip(pictures, colours, strict=True)):
                picture.save(work / f"{place}-picture.png")
                colour.save(work / f"{place}-patches.png")
                (attended,) = attention_maps(backbone, picture, mean=True)
                attended.save(work / f"{place}-attention.png")


def _shown(source: Source, row: int) -> Image.Image:
    """The picture of this row, or of the first one after it that can be read."""
    for place in range(row, row + TRIED):
        try:
            image = decode(source.read(place % len(source)), at_least=SIDE)
        except Unreadable:
            continue
        image.thumbnail((SIDE, SIDE))
        return image
    raise UserError(f"{TRIED} pictures in a row of {source.name} cannot be read")
