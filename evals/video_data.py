"""Videos whose every frame has a mask: which objects the first frame marks, and where they go."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinov2.exits import UserError
from evals.dense_data import DensePart

OBJECTS = ("auto", "one", "several")
VOID = 255  # the id of pixels that count for nothing where objects have ids; the object, where there is one


@dataclass(frozen=True)
class Sequence:
    """The frames of one folder, in order.

    Attributes:
        rows: of the part, one a frame.
        size: (width, height) of each.
        several: the objects are told apart by their ids.
    """

    name: str
    part: DensePart
    rows: list[int]
    size: tuple[int, int]
    several: bool

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, frame: int) -> Image.Image:
        """Raises UserError if it is not as large as the first."""
        image = self.part.image(self.rows[frame])
        if image.size != self.size:
            path = self.part.part.frames[self.rows[frame]].image
            raise UserError(f"{path} is {_by(image.size)}, the first of its sequence {_by(self.size)}")
        return image

    @cached_property
    def objects(self) -> list[int]:
        """The ids that the first mask holds; of one object, 1."""
        if not self.several:
            return [1]
        return [int(id_) for id_ in np.unique(self._ids(0)) if id_ not in (0, VOID)]

    def numbers(self, frame: int) -> NDArray[np.uint8]:
        """The object of each pixel, counted from 1 as in `objects`; 0 is none of them."""
        ids = self._ids(frame)
        if not self.several:
            return (ids != 0).astype(np.uint8)
        numbers = np.zeros(ids.shape, dtype=np.uint8)
        for number, id_ in enumerate(self.objects, start=1):
            numbers[ids == id_] = number
        return numbers

    def counted(self, frame: int) -> NDArray[np.bool_] | None:
        """The pixels that count; None: all of them."""
        return self._ids(frame) != VOID if self.several else None

    def _ids(self, frame: int) -> NDArray[np.int64]:
        return self.part.ids(self.rows[frame], self.size)


def sequences_of(part: DensePart, objects: str) -> list[Sequence]:
    """The sequences of a part, by folder.

    Args:
        objects: "one" or "several", or "auto": several where a first mask has an id beside 0 and 255.

    Raises:
        UserError: a first frame marks no object.
    """
    rows: dict[str, list[int]] = {}
    for row, frame in enumerate(part.part.frames):
        rows.setdefault(str(frame.image.parent), []).append(row)
    found = []
    for folder, some in rows.items():
        size = part.image(some[0]).size
        ids = set(np.unique(part.ids(some[0], size)).tolist()) - {0}
        several = objects == "several" or (objects == "auto" and bool(ids - {VOID}))
        if not (ids - {VOID} if several else ids):
            raise UserError(f"{part.part.frames[some[0]].mask} marks no object to follow")
        found.append(Sequence(folder.rsplit("/", 1)[-1], part, some, size, several))
    return found


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
