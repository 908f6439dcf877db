"""CamVid as the field passes it on: train/ with trainannot/ (ids) or with train_labels/ (colours).

With ids there are 11 classes, and 11 itself is void. With colours, class_dict.csv (name, r, g, b) says what
they are; the one called Void does not count. The test part is test/, or val/ where there is no test/.
"""

import csv
from pathlib import Path

from dinov2.exits import UserError
from evals.layouts.part import TRAIN, Colour, Frame, Part, by_stem, pictures_in

NAMES = "sky building pole road pavement tree sign fence car pedestrian bicyclist"
IDS, COLOURS, TABLE = "annot", "_labels", "class_dict.csv"


def here(root: Path) -> bool:
    return any((root / f"train{suffix}").is_dir() for suffix in (IDS, COLOURS))


def find(root: Path, part: str) -> Part:
    name = "train" if part == TRAIN else "test" if (root / "test").is_dir() else "val"
    images = pictures_in(root / name)
    if (root / (name + IDS)).is_dir():
        masks = by_stem(images, root / (name + IDS), "mask")
        return Part(_frames(images, masks), tuple(NAMES.split()), ignored=frozenset({11, 255}))
    masks = by_stem(images, root / (name + COLOURS), "mask", suffix="_L")
    colours = _table(root / TABLE)
    void = [number for number, (label, _) in enumerate(colours) if label.lower() == "void"]
    kept = [number for number in range(len(colours)) if number not in void]
    return Part(
        _frames(images, masks),
        classes=tuple(colours[number][0] for number in kept),
        ignored=frozenset(void),
        renumbered={stored: number for number, stored in enumerate(kept)},
        colours={colour: number for number, (_, colour) in enumerate(colours)},
    )


def _frames(images: list[Path], masks: list[Path]) -> list[Frame]:
    return [Frame(image, mask) for image, mask in zip(images, masks, strict=True)]


def _table(path: Path) -> list[tuple[str, Colour]]:
    if not path.is_file():
        raise UserError(f"the masks are colours, and there is no {path} to say which (name, r, g, b)")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        return [(row["name"], (int(row["r"]), int(row["g"]), int(row["b"]))) for row in rows]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} needs the columns name, r, g, b with numbers from 0 to 255") from None
