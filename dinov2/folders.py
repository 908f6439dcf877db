"""Output folders: each belongs to one set of settings and to one process at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from dinov2.config import default_identity, identity, to_yaml
from dinov2.exits import UserError
from dinov2.files import lock, remove_leftovers, write_text

CONFIG = "config.yaml"
LOCK = ".lock"
UNSET = "unset"  # what a key of ours is in a folder of a version that did not have it


@contextmanager
def claim(
    folder: Path | str,
    config: Any,
    free: Callable[[str], bool] = lambda key: False,
    hint: Callable[[list[str]], str] = lambda differing: "",
    shared: bool = False,
) -> Iterator[Path]:
    """Hold `folder` for a stage with these settings while the block runs, making it if need be.

    The folder remembers its settings in `config.yaml`. The same settings (runtime ones apart) continue what
    is there; nothing is ever overwritten for others. As long as there is nothing but `config.yaml`, as after
    a command that stopped at a misspelt source, other settings may take the folder over.

    Args:
        free: says of a setting's dotted key whether it may differ in a folder that goes on.
        shared: others who say so too may hold it at the same time; what killed ones left then stays.
        hint: what to add to the error about settings that may not, whose keys it is given.

    Raises:
        UserError: the folder cannot be made, is in use, holds something else, or belongs to other settings
            (listed).
    """
    if not str(folder):
        raise UserError("output= is empty; name a folder")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output={folder} is a file; name a folder")
    if folder.is_dir() and not (folder / CONFIG).exists() and _holds_work(folder):
        raise UserError(f"output={folder} holds something else; name an empty or new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output={folder} cannot be made: {error.strerror}; name another folder") from None
    try:
        with lock(folder / LOCK, blocking=False, shared=shared):
            _check_owner(folder, config, free, hint)
            if not shared:
                remove_leftovers(folder)
            write_text(folder / CONFIG, to_yaml(config))
            yield folder
    except BlockingIOError as error:
        raise UserError(f"output={folder} is in use by {error or 'another process'}") from None


def _holds_work(folder: Path) -> bool:
    return any(not path.name.startswith(".") and path.name != CONFIG for path in folder.iterdir())


def _check_owner(
    folder: Path, config: Any, free: Callable[[str], bool], hint: Callable[[list[str]], str]
) -> None:
    path, here = folder / CONFIG, identity(config)
    if not path.exists():
        return
    try:
        stored = yaml.safe_load(path.read_text())
        there = {key: _at(stored, key) for key in here}
    except (yaml.YAMLError, TypeError, OSError):
        raise UserError(f"{path} cannot be read; name another output folder") from None
    if all(value == UNSET for value in there.values()):
        raise UserError(f"{path} is not of this command; name an empty or new output folder")
    if not _holds_work(folder):
        return
    # A folder of an older version lacks the keys that came since: it was made with what is their default now,
    # unless they are of a section named by the user. Keys that are gone do not count.
    there |= {
        key: default
        for key, default in default_identity(config).items()
        if there[key] == UNSET and not _named_since(stored, config, key)
    }
    differing = [key for key, value in here.items() if there[key] != value and not free(key)]
    if differing:
        listed = ", ".join(f"{key} ({there[key]} there, {here[key]} here)" for key in differing)
        raise UserError(
            f"output={folder} belongs to other settings: {listed}; use those or another folder"
            + hint(differing)
        )


def _named_since(stored: Any, config: Any, key: str) -> bool:
    """Whether a dotted key is of a section, by a name of the user's own, that the stored settings lack."""
    gone = False
    for part in key.split(".")[:-1]:
        gone = gone or part not in stored
        if gone and isinstance(config, dict):
            return True
        stored = {} if gone else stored[part]
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return False


def _at(values: Any, key: str) -> Any:
    """The value of a dotted key, which may itself be a dict, or UNSET."""
    for part in key.split("."):
        if part not in values:
            return UNSET
        values = values[part]
    return values
