"""ADE20K as the scene parsing challenge gives it (ADEChallengeData2016): 150 classes, 0 is none of them."""

from pathlib import Path

from evals.layouts.part import TRAIN, Frame, Part, by_stem, lines_of, pictures_in

CLASSES = 150
FOLDERS = {True: "training", False: "validation"}


def here(root: Path) -> bool:
    return (_base(root) / "annotations" / "training").is_dir()


def find(root: Path, part: str) -> Part:
    base, name = _base(root), FOLDERS[part == TRAIN]
    images = pictures_in(base / "images" / name)
    masks = by_stem(images, base / "annotations" / name, "mask")
    return Part(
        frames=[Frame(image, mask) for image, mask in zip(images, masks, strict=True)],
        classes=_names(base / "objectInfo150.txt"),
        ignored=frozenset({0}),
        renumbered={number + 1: number for number in range(CLASSES)},
    )


def _base(root: Path) -> Path:
    inner = root / "ADEChallengeData2016"
    return inner if inner.is_dir() else root


def _names(path: Path) -> tuple[str, ...]:
    """First of the names in each line's last column; numbers where the list is not there."""
    if not path.is_file():
        return tuple(f"class {number + 1}" for number in range(CLASSES))
    rows = [line.split("\t") for line in lines_of(path)[1:]]
    return tuple(row[-1].split(",")[0].strip() for row in rows[:CLASSES])
