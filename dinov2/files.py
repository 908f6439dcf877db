"""Files that appear whole or not at all, locks, and checksums.

Every stage may be killed at any moment. What it leaves under a final name is therefore always complete:
it is written under a temporary name in the same folder, flushed to the disk, and renamed.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dinov2.exits import UserError

if TYPE_CHECKING:
    import pyarrow

TEMPORARY = ".part-"  # prefix of names that may be left behind by a killed process, and may be deleted


@contextmanager
def write_whole(path: Path | str, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that takes the name `path` only when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=TEMPORARY, suffix="-" + path.name, dir=path.parent)
    try:
        with os.fdopen(handle, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def whole_folder(path: Path | str) -> Iterator[Path]:
    """A folder to fill that takes the name `path`, replacing what was there, when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=TEMPORARY, suffix="-" + path.name, dir=path.parent))
    try:
        yield work
        for file in work.rglob("*"):
            if file.is_file():
                _sync(file)
        os.chmod(work, 0o777 & ~_umask())
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent))
            os.replace(path, old / "old")
            os.replace(work, path)
            shutil.rmtree(old)
        else:
            os.replace(work, path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    sync_folder(path.parent)


def write_bytes(path: Path | str, data: bytes) -> None:
    with write_whole(path) as file:
        file.write(data)


def write_text(path: Path | str, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path | str, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_json(path: Path | str) -> Any:
    """Parse a JSON file. A missing or malformed one is a `UserError` that names it."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None


def write_table(path: Path | str, table: "pyarrow.Table") -> None:
    """Write a Parquet file whole; the same table gives the same bytes."""
    from pyarrow import parquet

    with write_whole(path) as file:
        parquet.write_table(table, file, compression="zstd")


def sha256_of(path: Path | str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def lock(path: Path | str, *, blocking: bool = True, shared: bool = False) -> Iterator[None]:
    """Hold a lock on `path`, which dies with the process: an exclusive one, or one shared with its like.

    Raises:
        BlockingIOError: `blocking` is false and another process holds it; its note is the exception's text.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(file, kind | (0 if blocking else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            raise BlockingIOError(file.read().strip()) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield


def remove_leftovers(folder: Path, *, deep: bool = False) -> None:
    """Delete what killed processes left under temporary names in `folder` (deep: or below). Hold its lock."""
    for path in list(folder.glob(("**/" if deep else "") + TEMPORARY + "*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
