"""NYU Depth v2 as folders of synchronised frames: sync/SCENE/rgb_*.jpg with sync_depth_*.png beside them.

Training frames lie in sync/, the 654 official test frames in official_splits/test/. Depths are 16 bit
millimetres, up to 10 m; the pixels that count are those of Eigen's crop.
"""

from pathlib import Path

from evals.layouts.part import TRAIN, Frame, Part, existing, pictures_in

PLACES = {True: "sync", False: "official_splits/test"}


def here(root: Path) -> bool:
    return any((root / place).is_dir() for place in PLACES.values())


def find(root: Path, part: str) -> Part:
    images = pictures_in(root / PLACES[part == TRAIN], "*/rgb_*")
    return Part(
        frames=[Frame(image, depth=_depth(image)) for image in images], metres=0.001, far=10.0, crop="eigen"
    )


def _depth(image: Path) -> Path:
    name = "sync_depth_" + image.stem.removeprefix("rgb_") + ".png"
    return existing(image.with_name(name), image, "depth")
