"""Cityscapes: leftImg8bit/ and gtFine/, by part and city; 19 classes are evaluated, the other ids are not."""

from pathlib import Path

from evals.layouts.part import TRAIN, Frame, Part, existing, pictures_in

IDS = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
STORED = range(34)  # ids of labelIds files
PICTURE = "_leftImg8bit.png"


def here(root: Path) -> bool:
    return (root / "leftImg8bit").is_dir() and (root / "gtFine").is_dir()


def find(root: Path, part: str) -> Part:
    name = "train" if part == TRAIN else "val"
    images = pictures_in(root / "leftImg8bit" / name, f"*/*{PICTURE}")
    folder = root / "gtFine" / name
    return Part(
        frames=[Frame(image, _mask(image, folder)) for image in images],
        classes=tuple(IDS.values()),
        ignored=frozenset(STORED) - IDS.keys() | {255},  # 255: licence plates, -1 as a byte
        renumbered={stored: number for number, stored in enumerate(IDS)},
    )


def _mask(image: Path, folder: Path) -> Path:
    name = image.name.removesuffix(PICTURE) + "_gtFine_labelIds.png"
    return existing(folder / image.parent.name / name, image, "mask")
