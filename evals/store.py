"""The folder of features that tasks and backbones share: bounded, and safe to use in several processes."""

import os
import shutil
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path

from dinov2.files import TEMPORARY, lock, remove_leftovers


class Store:
    """A folder of folders. Those that no process holds go when there is too much, the longest unused first.

    What is held is never removed, so a limit smaller than what is in use is exceeded.
    """

    def __init__(self, folder: Path, limit_gib: float) -> None:
        self.folder, self.limit = folder, int(limit_gib * 2**30)
        self._holds, self._held = ExitStack(), set[str]()

    def hold(self, key: str) -> Path:
        """The folder of this name, whether it is there or not, which nobody removes until `close`."""
        if key not in self._held:
            # Taking a lock writes to its file, whose time is when the folder was used last.
            self._holds.enter_context(lock(self._lock(key), shared=True))
            self._held.add(key)
        return self.folder / key

    def trim(self) -> list[str]:
        """Bring the store to its limit as far as others allow; returns what was removed."""
        removed = []
        # Where another process makes room, there is nothing to do.
        with suppress(BlockingIOError), lock(self.folder / ".trim.lock", blocking=False):
            remove_leftovers(self.folder)
            sizes = {
                path.name: _bytes(path) for path in self.folder.iterdir() if self._lock(path.name).exists()
            }
            total = sum(sizes.values())
            for key in sorted(sizes, key=lambda key: self._lock(key).stat().st_mtime_ns):
                if total <= self.limit:
                    break
                with suppress(BlockingIOError), lock(self._lock(key), blocking=False):
                    # By a rename, since a process killed halfway should not leave half of a folder.
                    gone = tempfile.mkdtemp(prefix=TEMPORARY, dir=self.folder)
                    os.replace(self.folder / key, Path(gone) / key)
                    shutil.rmtree(gone)
                    total -= sizes[key]
                    removed.append(key)
        return removed

    def close(self) -> None:
        """Let go of all folders."""
        self._holds.close()
        self._held.clear()

    def _lock(self, key: str) -> Path:
        return self.folder / f".{key}.lock"


def _bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # a temporary file may get its name meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total
