"""Pictures of any set by id: decoded for the page itself, as thumbnails for the many beside it.

What was taken out, or equals it in bytes or pixels, is not read: a grey tile stands for it, in any set.
"""

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from curation.faces import Box, hidden
from curation.filters import boxes_of
from curation.ingest import Ingested
from curation.looks import THUMB
from curation.run import Run
from curation.taken import among, taken
from dinov2.data.decode import Unreadable, decode

GREY = 190
TILES = 4  # along a side of a mosaic
SHOWN = TILES * TILES


class Pictures:
    """Where the ids of a run's pictures lead to; faces that are written blurred are blurred here too."""

    def __init__(self, run: Run) -> None:
        self._faces = boxes_of(run)
        self._sets = {role: Set(run, role, self._faces) for role in run.sets}

    def image(self, name: str) -> Image.Image | None:
        """Small, but large enough to be judged; None if it can no longer be read."""
        found, row = self._find(name)
        if found.gone[row]:
            return found.thumb(row)
        try:
            if name in self._faces:
                return hidden(decode(found.source.read(row)), self._faces[name])
            return decode(found.source.read(row), at_least=256)
        except Unreadable:  # it went away after ingest; the report goes without it
            return None

    def thumb(self, name: str) -> Image.Image:
        """As ingest left it, in its own proportions."""
        found, row = self._find(name)
        return found.thumb(row)

    def gone(self, name: str) -> bool:
        """Whether it was taken out, or equals what was."""
        found, row = self._find(name)
        return bool(found.gone[row])

    def uri(self, name: str) -> str:
        found, row = self._find(name)
        return found.source.table["uri"][row].as_py()

    def mosaic(self, names: Sequence[str]) -> Image.Image:
        """Rows of TILES thumbnails, at most as many."""
        names = names[:SHOWN]
        page = Image.new("RGB", (TILES * THUMB, -(-len(names) // TILES) * THUMB), (240, 242, 244))
        for place, name in enumerate(names):
            found, row = self._find(name)
            page.paste(found.square(row), (place % TILES * THUMB, place // TILES * THUMB))
        return page

    def _find(self, name: str) -> tuple["Set", int]:
        for found in self._sets.values():
            row = found.row(name)
            if row is not None:
                return found, row
        raise KeyError(name)


class Set:
    """One set: its source, sorted by id, and what ingest left of it."""

    def __init__(self, run: Run, role: str, faces: dict[str, list[Box]]) -> None:
        self.source = run.sets[role]
        self._run, self._role, self._faces = run, role, faces

    def row(self, name: str) -> int | None:
        ids = self.source.table["id"]
        row = bisect_left(range(len(ids)), name, key=lambda at: ids[at].as_py())
        return row if row < len(ids) and ids[row].as_py() == name else None

    @cached_property
    def gone(self) -> np.ndarray:
        """[n] bool: which are not to be shown."""
        return among(self._ingested.table, taken(self._run.folder))

    def square(self, row: int) -> Image.Image:
        if self.gone[row]:
            return Image.new("RGB", (THUMB, THUMB), (GREY, GREY, GREY))
        found = Image.fromarray(self._thumbs.rows(self._place[row : row + 1])[0])
        boxes = self._faces.get(self.source.table["id"][row].as_py())
        return hidden(found, boxes, of=self._size(row)) if boxes else found

    def _size(self, row: int) -> tuple[int, int]:
        return self._ingested.table["width"][row].as_py(), self._ingested.table["height"][row].as_py()

    def thumb(self, row: int) -> Image.Image:
        if self.gone[row]:
            return self.square(row)  # its size may not be known any more
        width, height = self._size(row)
        sides = (max(1, round(THUMB * side / max(width, height))) for side in (width, height))
        return self.square(row).resize(tuple(sides), Image.Resampling.BILINEAR)  # pyright: ignore[reportArgumentType]

    @cached_property
    def _ingested(self) -> Ingested:
        return Ingested(self._run, self._role)

    @cached_property
    def _thumbs(self) -> Any:
        return self._ingested.thumbs()

    @cached_property
    def _place(self) -> np.ndarray:
        """[n] where the thumbnail of each row lies; only readable pictures have one."""
        return np.cumsum(self._ingested.table["error"].is_null().to_numpy()) - 1
