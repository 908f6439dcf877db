"""Pictures with a mask or a depth for every pixel, in two parts, read and checked one by one."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinov2.config import one_of
from dinov2.console import progress
from dinov2.data.decode import Unreadable, decode, opened
from dinov2.data.specs import default_name
from dinov2.exits import UserError
from evals.config import EvalConfig
from evals.layouts import LAYOUTS, TEST, TRAIN, Part, open_layout

IGNORED = -1  # the class of pixels that count for nothing
BEYOND = -2  # of those whose id is no class
MASK, DEPTH = "mask", "depth"  # what a task wants to know of each picture
COLOUR_MODES = ("RGB", "RGBA", "CMYK", "YCbCr")
Classes = NDArray[np.int32]  # [height, width], IGNORED where nothing counts
Metres = NDArray[np.float32]  # [height, width], 0 where unknown


@dataclass(frozen=True, kw_only=True)
class LayoutConfig(EvalConfig):
    """Settings of tasks whose pictures lie as the field's data sets do."""

    layout: str = "auto"  # ade20k, cityscapes, voc, nyuv2, kitti, camvid, davis, pairs; auto: as it looks

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.layout, ("auto", *LAYOUTS), "layout")


@dataclass(frozen=True)
class DensePart:
    """One part: its pictures, and what is where in them. Rows count from 0.

    `read` methods raise a UserError that names the file that does not fit.
    """

    part: Part
    place: Path

    def __len__(self) -> int:
        return len(self.part.frames)

    @property
    def name(self) -> str:
        return default_name(str(self.place))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the names and sizes of all files: of the pictures, and of the truth about them."""
        digest = hashlib.sha256()
        for path in (path for frame in self.part.frames for path in frame if path is not None):
            digest.update(f"{os.path.relpath(path, self.place)} {path.stat().st_size}\n".encode())
        return digest.hexdigest()[:32]

    def shown_name(self, row: int) -> str:
        """A picture as a reader knows it: its folder may tell it from others of its name."""
        return "/".join(self.part.frames[row].image.relative_to(self.place).parts[-2:])

    def image(self, row: int) -> Image.Image:
        path = self.part.frames[row].image
        try:
            return decode(path.read_bytes())
        except (OSError, Unreadable) as error:
            raise UserError(f"{path} cannot be read: {error}") from None

    def ids(self, row: int, size: tuple[int, int]) -> NDArray[np.int64]:
        """What a mask holds, as it is stored; `size` is the picture's (width, height)."""
        path = self._truth(row, MASK)
        ids = self._ids(path)
        _check_size(path, ids.shape, size)
        return ids

    def mask(self, row: int, size: tuple[int, int]) -> Classes:
        """Classes of the pixels."""
        path, ids = self._truth(row, MASK), self.ids(row, size)
        if (unknown := ids[(ids < 0) | (ids >= len(self._numbers))]).size:
            raise UserError(self._beyond(path, int(unknown.flat[0])))
        numbers = self._numbers[ids]
        if (beyond := numbers == BEYOND).any():
            raise UserError(self._beyond(path, int(ids[beyond].flat[0])))
        return numbers

    def depth(self, row: int, size: tuple[int, int]) -> Metres:
        path = self._truth(row, DEPTH)
        stored = np.asarray(_opened(path))
        if stored.ndim != 2:
            raise UserError(f"{path} is no depth: it has {stored.shape[-1]} channels")
        _check_size(path, stored.shape, size)
        metres = self.part.metres
        if metres is None:
            if stored.dtype == np.uint8:
                raise UserError(f"{path} has 8 bits: say by metres= what one unit is")
            metres = 0.001
        return stored.astype(np.float32) * np.float32(metres)

    def stored_ids(self) -> NDArray[np.int64]:
        """All ids that the masks hold, sorted, without those that are ignored: reads every mask."""
        found: set[int] = set()
        for row in progress(range(len(self)), what=f"classes of {self.name}"):
            found |= set(np.unique(self._ids(self._truth(row, MASK))).tolist())
        return np.array(sorted(found - self.part.ignored), dtype=np.int64)

    @cached_property
    def _numbers(self) -> NDArray[np.int32]:
        """Class of each stored id; BEYOND where there is none."""
        classes = len(self.part.classes)
        known = self.part.renumbered or {number: number for number in range(classes)}
        numbers = np.full(max([255, *self.part.ignored, *known]) + 1, BEYOND, dtype=np.int32)
        for stored, number in known.items():
            numbers[stored] = number
        numbers[list(self.part.ignored)] = IGNORED
        return numbers

    def _truth(self, row: int, what: str) -> Path:
        frame = self.part.frames[row]
        path = frame.mask if what == MASK else frame.depth
        if path is None:
            raise UserError(f"{frame.image} has no {what}")
        return path

    def _ids(self, path: Path) -> NDArray[np.int64]:
        image = _opened(path)
        if self.part.colours:
            return self._ids_of_colours(path, np.asarray(image.convert("RGB")))
        if image.mode in COLOUR_MODES:
            raise UserError(
                f"{path} is in colour ({image.mode}): a mask holds class ids, grey or as a palette"
            )
        return np.asarray(image).astype(np.int64)

    def _ids_of_colours(self, path: Path, colours: NDArray[np.uint8]) -> NDArray[np.int64]:
        packed = colours.astype(np.int64) @ np.array([65536, 256, 1])
        known = {r * 65536 + g * 256 + b: id_ for (r, g, b), id_ in self.part.colours.items()}
        there, inverse = np.unique(packed, return_inverse=True)
        strange = [int(value) for value in there if int(value) not in known]
        if strange:
            red, rest = divmod(strange[0], 65536)
            raise UserError(f"{path} has the colour {red}, {rest // 256}, {rest % 256}, which is no class")
        return np.array([known[int(value)] for value in there])[inverse].reshape(packed.shape)

    def _beyond(self, path: Path, stored: int) -> str:
        return (
            f"{path} has the id {stored}, beyond the {len(self.part.classes)} classes; say ignore=[{stored}] "
            "if it is none, or classes="
        )


@dataclass(frozen=True)
class DenseParts:
    """What a dense task needs. Classes are those of the training part."""

    train: DensePart
    test: DensePart

    @property
    def sources(self) -> dict[str, DensePart]:
        return {"train": self.train, "test": self.test}

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.part.classes


def labelled_parts(config: LayoutConfig, ignore: Sequence[int], classes: int | None) -> DenseParts:
    """Both parts of `data=`, or `train=` and `test=`, with masks.

    Args:
        ignore: ids that count for nothing, beside those of the layout.
        classes: how many; None: as many as the layout has, or the training masks show.

    Raises:
        UserError: a part is missing; a picture has no mask; both parts share pictures.
    """
    train, test = (open_part(config, part, MASK, ignore) for part in (TRAIN, TEST))
    _check_apart(train, test)
    names = train.part.classes
    if names and classes not in (None, len(names)):
        raise UserError(f"classes={classes}: {train.place} has {len(names)}; leave classes= out")
    names = names or _numbered(train, classes)
    train, test = (replace(one, part=replace(one.part, classes=names)) for one in (train, test))
    return DenseParts(train, test)


def measured_parts(config: LayoutConfig, metres: float | None) -> DenseParts:
    """Both parts with depths; `metres` is what one unit of a stored depth is, None as the layout says."""
    train, test = (open_part(config, part, DEPTH) for part in (TRAIN, TEST))
    _check_apart(train, test)
    if metres is not None:
        train, test = (replace(one, part=replace(one.part, metres=metres)) for one in (train, test))
    return DenseParts(train, test)


def open_part(config: LayoutConfig, part: str, want: str, ignore: Sequence[int] = ()) -> DensePart:
    """One part; `part` is "train" or "test", which are settings too."""
    named = config.train if part == TRAIN else config.test
    if (config.data is None) == (named is None):
        raise UserError(f"give data=ROOT, or {part}=FOLDER, and not both")
    place = Path(str(named or config.data)).expanduser()
    found = open_layout(place, part, config.layout)
    lacking = next((one for one in found.frames if (one.mask if want == MASK else one.depth) is None), None)
    if lacking is not None:
        raise UserError(f"{lacking.image} has no {want}: there is no folder of {want}s beside its own")
    return DensePart(replace(found, ignored=found.ignored | set(ignore)), place)


def _check_apart(train: DensePart, test: DensePart) -> None:
    if {frame.image for frame in train.part.frames} & {frame.image for frame in test.part.frames}:
        raise UserError("train and test share pictures; name two folders that share none")


def _numbered(train: DensePart, classes: int | None) -> tuple[str, ...]:
    """Classes without names: as many as were given, or up to the highest id of the training masks."""
    if classes is None:
        there = train.stored_ids()
        if not len(there):
            raise UserError(f"the masks of {train.name} hold nothing but ignored ids")
        classes = int(there[-1]) + 1
    return tuple(f"class {number}" for number in range(classes))


def _opened(path: Path) -> Image.Image:
    try:
        return opened(path.read_bytes())
    except Exception as error:  # whatever Pillow raises for a damaged file
        raise UserError(f"{path} cannot be read: {error}") from None


def _check_size(path: Path, shape: tuple[int, ...], size: tuple[int, int]) -> None:
    if shape[::-1] != size:
        given = " x ".join(map(str, shape[::-1]))
        raise UserError(f"{path} is {given}, its picture {size[0]} x {size[1]}")
