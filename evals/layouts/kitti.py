"""KITTI depth: raw drives, and the annotated depth of their frames (data_depth_annotated).

    2011_09_26/DRIVE_sync/image_02/data/FRAME.png                          the raw pictures
    train/DRIVE_sync/proj_depth/groundtruth/image_02/FRAME.png             their depth, and val/ likewise
    depth_selection/val_selection_cropped/image/… and groundtruth_depth/…  the selected, if they are there

16 bit, 256 units a metre, 0 where the laser saw nothing; up to 80 m; Garg's crop.
"""

from pathlib import Path

from dinov2.exits import UserError
from evals.layouts.part import TRAIN, Frame, Part, existing, pictures_in

SELECTED = ("depth_selection/val_selection_cropped", "val_selection_cropped")
ANNOTATED = "*/proj_depth/groundtruth/image_0[23]/*.png"


def here(root: Path) -> bool:
    return any((root / place).is_dir() for place in SELECTED) or any(root.glob("train/*/proj_depth"))


def find(root: Path, part: str) -> Part:
    selected = next((root / place for place in SELECTED if (root / place).is_dir()), None)
    if part == TRAIN or selected is None:
        frames = _annotated(root, "train" if part == TRAIN else "val")
    else:
        frames = _selected(selected)
    return Part(frames=frames, metres=1 / 256, far=80.0, crop="garg")


def _annotated(root: Path, part: str) -> list[Frame]:
    """Depth is there for all but the first and last five frames of a drive, so it says which frames count."""
    return [Frame(_raw(root, depth), depth=depth) for depth in pictures_in(root / part, ANNOTATED)]


def _raw(root: Path, depth: Path) -> Path:
    drive, camera = depth.parents[3].name, depth.parent.name
    day = drive[: len("2011_09_26")]
    places = [root / top / drive / camera / "data" / depth.name for top in (day, f"raw/{day}", "raw")]
    image = next((place for place in places if place.exists()), None)
    if image is None:
        raise UserError(f"{depth} has no picture: {places[0]} does not exist")
    return image


def _selected(folder: Path) -> list[Frame]:
    images = pictures_in(folder / "image")
    depths = folder / "groundtruth_depth"
    names = [image.name.replace("_image_0", "_groundtruth_depth_0", 1) for image in images]
    return [
        Frame(image, depth=existing(depths / name, image, "depth"))
        for image, name in zip(images, names, strict=True)
    ]
