"""Checkpoints: everything a run continues from, visible only when whole.

`checkpoints/00001200/` holds the state after 1200 steps, written by torch.distributed.checkpoint: it shards
by rank and loads on another number of ranks. A folder is renamed into place when all of it is on disk, while
training goes on.
"""

import os
import re
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from dinov2.exits import UserError
from dinov2.files import TEMPORARY, remove_leftovers, sync_folder
from dinov2.parallel import barrier, is_main, world

IN_THIS_THREAD = StagingOptions(
    use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
)
NAME = re.compile(r"\d{8}")


class Checkpoints:
    """The checkpoints of one run folder.

    Saving copies the state to the host's memory and returns; a thread writes the copy, shows it under its
    name when all ranks have written, and drops old ones. The end of the context awaits the last write.

    Args:
        folder: `RUN/checkpoints`.
        keep: how many of the latest to keep.
        keep_every: besides, each one whose step is a multiple of this stays for good; 0 for none.
    """

    def __init__(self, folder: Path, *, keep: int = 2, keep_every: int = 0) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._stager = DefaultStager(IN_THIS_THREAD)  # keeps the memory of its copy for the next one
        self._group: Any = None  # of processes; apart from training's, whose collectives go on meanwhile

    def __enter__(self) -> Self:
        if is_main() and self.folder.is_dir():
            remove_leftovers(self.folder)
        if world() > 1:
            self._group = dist.new_group(backend="gloo")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(Exception) if error else nullcontext():  # what ended the block is the better reason
            self.wait()
        self._stager.close()

    def steps(self) -> list[int]:
        """The steps that have a whole checkpoint, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if NAME.fullmatch(path.name))

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Begin to write the state after `step` steps. All ranks call it; it appears whole or not at all.

        The tensors may change as soon as this returns. If the last checkpoint is still being written, it
        waits for that first: at most one copy of the state is in memory.

        Raises:
            OSError: the last one could not be written; the disk may be full.
        """
        self.wait()
        work = self.folder / f"{TEMPORARY}{step:08d}"
        if is_main():
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
        barrier()
        copy = self._stager.stage(state)
        self._writing = self._thread.submit(self._write, step, work, copy)

    def wait(self) -> None:
        """Return when nothing is being written any more on this rank.

        Raises:
            OSError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except CheckpointException as error:
            raise _reason(error) from error

    def _write(self, step: int, work: Path, copy: Any) -> None:
        _quietly(dcp_save, copy, work, process_group=self._group)
        # The main rank comes here when every rank's part is on its disk.
        if is_main() and not self._path(step).exists():
            os.replace(work, self._path(step))
            sync_folder(self.folder)
            self._drop_old()

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

    def shapes(self, step: int) -> dict[str, torch.Size]:
        """The shapes of its tensors, by dotted name."""
        described = FileSystemReader(self._path(step)).read_metadata().state_dict_metadata
        return {key: x.size for key, x in described.items() if isinstance(x, TensorStorageMetadata)}

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


def _reason(error: CheckpointException) -> BaseException:
    """The OSError behind a failed write: torch's file writer raises a RuntimeError of its own over it."""
    first: BaseException | None = next((cause for cause, _ in error.failures.values()), None)
    inner = first
    while inner is not None:
        if isinstance(inner, OSError):
            return inner
        inner = inner.__cause__ or inner.__context__
    return first or error


def _quietly(operation: Any, state: dict[str, Any], path: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        # On one process there is no group to coordinate with, which is said anew at each save.
        warnings.filterwarnings("ignore", message=".*process group.*|.*single process.*")
        return operation(state, checkpoint_id=path, no_dist=world() == 1, **options)
