"""torchvision's data sets by name: `torchvision:CIFAR10?root=DIR`, downloaded where there is a network.

Pictures are written once into folders of classes, `DIR/CIFAR10-pictures/train/CLASS/`, and read from there.
"""

import inspect
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from PIL import Image

from dinov2.data.sources import Source, open_source
from dinov2.exits import UserError
from dinov2.files import whole_folder

PREFIX = "torchvision:"
PARTS = {"train": ("train", "trainval", "train-standard"), "test": ("test", "val")}  # what sets call theirs


def find(spec: str, cache: Path | None = None) -> Source:
    """Both parts of the set, as split train and test; of a set without parts, all of it.

    Raises:
        UserError: there is no such set, no root, no network, or its items are not pictures with a class.
    """
    name, _, options = spec.removeprefix(PREFIX).partition("?")
    key, _, root = options.partition("=")
    if key != "root" or not root:
        raise UserError(f"{spec}: say where it lies or is to be put: {PREFIX}{name or 'CIFAR10'}?root=DIR")
    kind = _kind(name)
    folder = Path(root).expanduser() / f"{name}-pictures"
    if not folder.is_dir():
        with whole_folder(folder) as work:
            for part, words in PARTS.items():
                found = _opened(kind, name, Path(root).expanduser(), part, words)
                if found is None:  # no parts: what there is serves as both, which tasks will refuse
                    found, part = _opened(kind, name, Path(root).expanduser(), "", ()), ""
                _write(found, work / part, name)
                if not part:
                    break
    return open_source(f"{name}={folder}", cache=cache)


def _kind(name: str) -> Any:
    import dinov2.vision_ops  # noqa: F401  # so that torchvision can be imported beside a CPU torch

    from torchvision import datasets

    known = [one for one in datasets.__all__ if one[0].isupper()]
    if name not in known:
        near = get_close_matches(name, known, n=1)
        raise UserError(
            f"torchvision has no data set {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return getattr(datasets, name)


def _opened(kind: Any, name: str, root: Path, part: str, words: tuple[str, ...]) -> Any:
    """The set, or None if it has no such parts."""
    parameters = inspect.signature(kind).parameters
    options: dict[str, Any] = {"download": True} if "download" in parameters else {}
    choices: list[dict[str, Any]] = [{}]
    if part and "train" in parameters:
        choices = [{"train": part == "train"}]
    elif part and "split" in parameters:
        choices = [{"split": word} for word in words]
    elif part:
        return None
    for number, choice in enumerate(choices):
        try:
            return kind(root=str(root), **options, **choice)
        except (ValueError, TypeError) as error:  # it calls its parts otherwise, or wants more
            if number == len(choices) - 1:
                raise UserError(f"{PREFIX}{name}: {_line(error)}") from None
        except (OSError, RuntimeError) as error:  # what a network that is not there comes to
            raise UserError(
                f"{PREFIX}{name} could not be had ({_line(error)}); "
                f"without a network, put its files into {root}"
            ) from None
    return None


def _write(found: Any, folder: Path, name: str) -> None:
    classes = getattr(found, "classes", None)
    for number in range(len(found)):
        image, label = found[number][:2]
        if not isinstance(image, Image.Image) or not isinstance(label, int):
            raise UserError(f"{PREFIX}{name} is no set of pictures with one class each")
        named = str(classes[label]).replace("/", "-") if classes else str(label)
        place = folder / f"{label:04d} {named}"
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{number:06d}.png")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
