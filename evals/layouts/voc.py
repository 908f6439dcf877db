"""PASCAL VOC: JPEGImages/, SegmentationClass/ and the lists in ImageSets/Segmentation/; 255 is void."""

from pathlib import Path

from evals.layouts.part import TRAIN, Frame, Part, existing, lines_of

NAMES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
)
MASKS = "SegmentationClass"
INNER = ("VOCdevkit/VOC2012", "VOC2012", "VOCdevkit/VOC2007", "VOC2007")


def here(root: Path) -> bool:
    return (_base(root) / MASKS).is_dir() and (_base(root) / "JPEGImages").is_dir()


def find(root: Path, part: str) -> Part:
    base = _base(root)
    listed = lines_of(base / "ImageSets" / "Segmentation" / ("train.txt" if part == TRAIN else "val.txt"))
    return Part(frames=[_frame(base, name) for name in listed], classes=tuple(NAMES.split()))


def _frame(base: Path, name: str) -> Frame:
    image = base / "JPEGImages" / f"{name}.jpg"
    return Frame(existing(image, image, "file"), existing(base / MASKS / f"{name}.png", image, "mask"))


def _base(root: Path) -> Path:
    return next((root / inner for inner in INNER if (root / inner).is_dir()), root)
