"""DAVIS 2016 and 2017: JPEGImages/480p/SEQUENCE/, Annotations/480p/SEQUENCE/, lists in ImageSets/.

Masks of 2016 are 0 and 255: one object. Those of 2017 are the objects' numbers, 255 is void.
"""

from pathlib import Path

from dinov2.exits import UserError
from evals.layouts.part import TRAIN, Frame, Part, existing, lines_of, pictures_in

PICTURES, MASKS, LISTS = "JPEGImages", "Annotations", "ImageSets"
YEARS = ["2017", "2016"]
RESOLUTIONS = ("480p", "Full-Resolution", "1080p")


def here(root: Path) -> bool:
    return (root / PICTURES).is_dir() and (root / MASKS).is_dir()


def find(root: Path, part: str, year: str | None = None) -> Part:
    """All frames of the part's sequences, one after the other; a sequence is a folder.

    Args:
        year: whose lists, where there are several: "2017" or "2016"; by default the newer.
    """
    resolution = next((name for name in RESOLUTIONS if (root / PICTURES / name).is_dir()), None)
    if resolution is None:
        raise UserError(f"{root / PICTURES} has none of {', '.join(RESOLUTIONS)}")
    pictures, masks = root / PICTURES / resolution, root / MASKS / resolution
    names = _sequences(root, pictures, "train" if part == TRAIN else "val", year)
    images = [image for name in names for image in pictures_in(pictures / name)]
    return Part([Frame(image, _mask(masks, image)) for image in images], ignored=frozenset())


def _mask(masks: Path, image: Path) -> Path:
    return existing(masks / image.parent.name / f"{image.stem}.png", image, "mask")


def _sequences(root: Path, pictures: Path, part: str, year: str | None) -> list[str]:
    """Those of the list, by name; without lists, all that are there. Lists of 2016 may name every frame."""
    lists = [root / LISTS / name / f"{part}.txt" for name in ([year] if year else YEARS) + ["480p"]]
    found = next((path for path in lists if path.is_file()), None)
    if found is None:
        if year is not None and (root / LISTS).is_dir():
            raise UserError(f"there is no list {lists[0]}")
        return sorted(path.name for path in pictures.iterdir() if path.is_dir())
    names = [line.split()[0] for line in lines_of(found)]
    return list(dict.fromkeys(Path(name).parent.name if "/" in name else name for name in names))
