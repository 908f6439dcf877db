"""How the field's data sets lie in folders. A new one is a file with `here` and `find`, and a line here."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dinov2.config import one_of
from dinov2.exits import UserError
from evals.layouts import ade20k, camvid, cityscapes, davis, kitti, nyuv2, pairs, voc
from evals.layouts.part import TEST, TRAIN, Frame, Part

__all__ = ["LAYOUTS", "TEST", "TRAIN", "Frame", "Layout", "Part", "open_layout"]


class Layout(NamedTuple):
    """How a data set lies.

    Attributes:
        here: whether a folder looks like it.
        find: the frames of a part of it ("train" or "test").
    """

    here: Callable[[Path], bool]
    find: Callable[[Path, str], Part]


# In the order in which `auto` asks them: the last fits nearly anything.
LAYOUTS: dict[str, Layout] = {
    "ade20k": Layout(ade20k.here, ade20k.find),
    "cityscapes": Layout(cityscapes.here, cityscapes.find),
    "voc": Layout(voc.here, voc.find),
    "nyuv2": Layout(nyuv2.here, nyuv2.find),
    "kitti": Layout(kitti.here, kitti.find),
    "camvid": Layout(camvid.here, camvid.find),
    "davis": Layout(davis.here, davis.find),
    "pairs": Layout(pairs.here, pairs.find),
}
AUTO = "auto"


def open_layout(root: Path | str, part: str, name: str = AUTO) -> Part:
    """The frames of a part of the data set at `root`.

    Args:
        name: a key of `LAYOUTS`, or "auto" for the first that the folder looks like.

    Raises:
        UserError: the folder is missing or looks like none; a picture has no mask or depth (it is named).
    """
    one_of(name, (AUTO, *LAYOUTS), "layout")
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"there is no folder {root}")
    if name != AUTO:
        return LAYOUTS[name].find(root, part)
    for layout in LAYOUTS.values():
        if layout.here(root):
            return layout.find(root, part)
    known = ", ".join(LAYOUTS)
    raise UserError(f"{root} looks like none of {known}; give layout=, or folders images/ and masks/")
