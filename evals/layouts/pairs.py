"""Any pictures with their masks or depths in a folder beside them, by the same names before the dot.

    ROOT/train/images/a.jpg   ROOT/train/masks/a.png   ROOT/train/depth/a.png     and val/ or test/ likewise

Masks hold class ids (grey or palette), 255 is ignored; depths are grey, 0 is unknown. 16 bits of depth are
taken as millimetres; of 8 bits only the user can say what they are.
"""

from pathlib import Path

from dinov2.exits import UserError
from evals.layouts.part import TRAIN, Frame, Part, by_stem, pictures_in

IMAGES = ("images", "image", "rgb", "imgs")
MASKS = ("masks", "mask", "labels", "label", "annotations", "segmentation")
DEPTHS = ("depth", "depths")
PARTS = {True: ("train", "training"), False: ("val", "test", "validation")}


def here(root: Path) -> bool:
    return _first(root, IMAGES) is not None or any(
        _first(root / name, IMAGES) is not None for names in PARTS.values() for name in names
    )


def find(root: Path, part: str) -> Part:
    """`root` is the part itself, or has it as a folder."""
    place = _first(root, PARTS[part == TRAIN])
    base = place or root
    folder = _first(base, IMAGES)
    if folder is None or (place is None and _has_other(root, part)):
        wanted = " or ".join(f"{name}/images" for name in PARTS[part == TRAIN])
        raise UserError(f"{root} has no folder {wanted}; or name each part by train= and test=")
    images = pictures_in(folder)
    masks, depths = _beside(base, images, MASKS, "mask"), _beside(base, images, DEPTHS, "depth")
    return Part([Frame(*paths) for paths in zip(images, masks, depths, strict=True)])


def _beside(base: Path, images: list[Path], names: tuple[str, ...], what: str) -> list[Path | None]:
    folder = _first(base, names)
    return [None] * len(images) if folder is None else [*by_stem(images, folder, what)]


def _has_other(root: Path, part: str) -> bool:
    return _first(root, PARTS[part != TRAIN]) is not None


def _first(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)
