"""What a layout finds: pictures, where the truth about each lies, and how its files are to be read."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dinov2.data.decode import picture_extensions
from dinov2.exits import UserError

TRAIN, TEST = "train", "test"  # the two parts of every layout
Colour = tuple[int, int, int]


class Frame(NamedTuple):
    """One picture, and the files that say what is where in it, or how far."""

    image: Path
    mask: Path | None = None
    depth: Path | None = None


@dataclass(frozen=True)
class Part:
    """The frames of one part of a data set, in order.

    Attributes:
        classes: names by number; empty where only the masks' ids say which classes there are.
        ignored: stored ids of pixels that count for nothing.
        renumbered: stored id to class number; empty: they are the same.
        colours: of masks that are stored as colours, the id of each.
        metres: what one unit of a stored depth is; None: only the user can say. 0 is no depth.
        far: metres of the greatest depth that counts.
        crop: which pixels count: a key of `evals.depth_metrics.CROPS`.
    """

    frames: Sequence[Frame]
    classes: tuple[str, ...] = ()
    ignored: frozenset[int] = frozenset({255})
    renumbered: Mapping[int, int] = field(default_factory=dict)
    colours: Mapping[Colour, int] = field(default_factory=dict)
    metres: float | None = None
    far: float = 10.0
    crop: str = "none"


def pictures_in(folder: Path, pattern: str = "*") -> list[Path]:
    """The picture files of a folder that match, sorted by name; hidden ones are none of ours.

    Raises:
        UserError: there is no such folder, or it holds none.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    found = [path for path in folder.glob(pattern) if not path.name.startswith(".") and _is_picture(path)]
    if not found:
        raise UserError(f"there are no pictures in {folder}" + (f" ({pattern})" if pattern != "*" else ""))
    return sorted(found)


def existing(path: Path, picture: Path, what: str) -> Path:
    """`path`, where it is; a `UserError` that names the picture without its mask or depth otherwise."""
    if not path.exists():
        raise UserError(f"{picture} has no {what}: {path} does not exist")
    return path


def by_stem(images: Iterable[Path], folder: Path, what: str, suffix: str = "") -> list[Path]:
    """For each picture the file of `folder` with its name before the dot (and `suffix`).

    Raises:
        UserError: a picture has none, or a file of the folder belongs to no picture.
    """
    there = {path.stem: path for path in pictures_in(folder)}
    found = []
    for image in images:
        path = there.pop(image.stem + suffix, None)
        if path is None:
            raise UserError(f"{image} has no {what}: {folder} has no picture {image.stem}{suffix}")
        found.append(path)
    if there:
        first = min(there.values())
        raise UserError(f"{len(there):,} of the {what}s in {folder} have no picture, {first.name} first")
    return found


def lines_of(path: Path) -> list[str]:
    """The lines of a list that hold something."""
    if not path.is_file():
        raise UserError(f"there is no list {path}")
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


def _is_picture(path: Path) -> bool:
    return path.suffix[1:].lower() in picture_extensions()
