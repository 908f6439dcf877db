"""Checkpoints: everything a run continues from, visible only when whole.

`checkpoints/00001200/` holds the state after 1200 steps, written by torch.distributed.checkpoint: it shards
by rank and loads on another number of ranks. A folder is renamed into place when all of it is on disk.
"""

import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from dinov2.exits import UserError
from dinov2.files import TEMPORARY, sync_folder
from dinov2.parallel import barrier, is_main, world

NAME = re.compile(r"\d{8}")


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        folder: `RUN/checkpoints`.
        keep: how many of the latest to keep.
        keep_every: besides, each one whose step is a multiple of this stays for good; 0 for none.
    """

    def __init__(self, folder: Path, *, keep: int = 2, keep_every: int = 0) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every

    def steps(self) -> list[int]:
        """The steps that have a whole checkpoint, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if NAME.fullmatch(path.name))

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after `step` steps. All ranks call it; it appears whole or not at all."""
        final, work = self._path(step), self.folder / f"{TEMPORARY}{step:08d}"
        if is_main():
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
        barrier()
        _quietly(dcp_save, state, work)
        barrier()
        if is_main() and not final.exists():
            os.replace(work, final)
            sync_folder(self.folder)
            self._drop_old()
        barrier()

    def load(self, step: int, state: dict[str, Any]) -> dict[str, Any]:
        """Fill `state`, whose tensors say shapes and sharding, in place; also returns it.

        Raises:
            UserError: the checkpoint is damaged or of another model.
        """
        try:
            _quietly(dcp_load, state, self._path(step))
        except (CheckpointException, OSError, RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"{self._path(step)} cannot be loaded ({reason}); delete it to go on from an earlier one"
            ) from error
        return state

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints of later steps. The main process calls it."""
        for later in self.steps():
            if later > step:
                self._drop(later)

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}"

    def _drop_old(self) -> None:
        for step in self.steps()[: -self.keep]:
            if not (self.keep_every and step % self.keep_every == 0):
                self._drop(step)

    def _drop(self, step: int) -> None:
        dead = self.folder / f"{TEMPORARY}{step:08d}"
        os.replace(self._path(step), dead)  # a half-deleted checkpoint must not look whole
        shutil.rmtree(dead)


def _quietly(operation: Any, state: dict[str, Any], path: Path) -> None:
    with warnings.catch_warnings():
        # On one process there is no group to coordinate with, which is said anew at each save.
        warnings.filterwarnings("ignore", message=".*process group.*|.*single process.*")
        operation(state, checkpoint_id=path, no_dist=world() == 1)
