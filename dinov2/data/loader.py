"""Batches as a function of the step: crops of rows of a source, from worker processes or from this one."""

import atexit
import ctypes
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import torch
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dinov2.data.augment import MultiCrop
from dinov2.data.decode import Unreadable
from dinov2.data.order import SampleOrder, derive_seed
from dinov2.data.pixels import Crops, Pixels
from dinov2.data.sources import Source
from dinov2.exits import UserError

REPLACEMENTS = 16  # tried for one unreadable picture; if all fail, the source is at fault


@dataclass
class Batch:
    """One rank's part of a step.

    Crops are ordered by crop first: all first global crops, then all second ones; likewise the local ones.
    """

    global_crops: Crops  # 2 * batch
    local_crops: Crops  # local crops * batch
    positions: Int64[Tensor, "batch"]  # in the order of data
    rows: Int64[Tensor, "batch"]  # of the source
    replaced: list[tuple[str, str]]  # id of a picture that could not be read, and why
    gram_crops: Crops | None = None  # the global crops larger and undistorted, where they are asked for
    changes: Float[Tensor, "crops 9"] | None = None  # what is left to the device, of global, then local crops

    def pin_memory(self) -> "Batch":
        """The same in page-locked memory, from which copies to a CUDA device overlap with computation."""
        return Batch(
            global_crops=self.global_crops.pin_memory(),
            local_crops=self.local_crops.pin_memory(),
            positions=self.positions,
            rows=self.rows,
            replaced=self.replaced,
            gram_crops=None if self.gram_crops is None else self.gram_crops.pin_memory(),
            changes=self.changes,
        )


def batches(
    source: Source,
    order: SampleOrder,
    crop: MultiCrop,
    *,
    seed: int,
    global_batch: int,
    rank: int = 0,
    world: int = 1,
    start_step: int = 0,
    stop_step: int | None = None,
    workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
) -> Generator[Batch, None, None]:
    """The batches of steps `start_step`, `start_step` + 1, …, to `stop_step` excluded, or without end.

    Step s of rank r holds the positions s * global_batch + r * local and following, local = global_batch /
    world. Picture and augmentation depend on the seed and the position alone: any number of workers, and a
    start at any step, give the same bits. Each worker makes whole batches, `prefetch` of them ahead. Workers
    end when the iterator is closed or dropped, and with this process, however that ends.

    Raises:
        UserError: ranks cannot share a batch equally; hardly any picture can be read; a worker was killed.
    """
    if global_batch % world:
        raise UserError(f"a batch of {global_batch} cannot be shared equally by {world} processes")
    loader = DataLoader(
        _Steps(source, order, crop, seed, global_batch, rank, world),
        batch_size=None,
        sampler=_StepNumbers(start_step, stop_step),
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=start_worker,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else the loader draws from the global random state
    )
    return _stream(loader)


def _stream(loader: DataLoader[Batch | UserError]) -> Generator[Batch, None, None]:
    others = set(multiprocessing.active_children())
    stream = _started(loader)
    workers = set(multiprocessing.active_children()) - others
    at_exit = atexit.register(partial(_end, workers))  # else Python would wait for them without end
    try:
        while (batch := _next(stream, workers)) is not None:
            yield batch
    finally:
        del stream  # its workers finish what they are at, and end
        _end(workers)  # those that did not: after an error, its traceback may keep the stream alive
        atexit.unregister(at_exit)


def _next(stream: Iterator[Batch | UserError], workers: set[BaseProcess]) -> Batch | None:
    """The next batch; None when there are no more."""
    try:
        batch = next(stream, None)
    except (RuntimeError, OSError, EOFError) as error:
        raise _loss_of(workers) or error from None
    if isinstance(batch, UserError):
        raise batch
    return batch


def _end(workers: set[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()


def _started(loader: DataLoader[Batch | UserError]) -> Iterator[Batch | UserError]:
    """The loader's iterator, without the signal handler that comes with it.

    torch's handler raises wherever the main thread is when a worker dies: in the middle of a checkpoint, say.
    Without it, the loss of a worker is noticed by who waits for the next batch, within five seconds.
    """
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def _loss_of(workers: set[BaseProcess]) -> UserError | None:
    """What to say if a worker has ended, else None."""
    ending = wait([worker.sentinel for worker in workers], timeout=1.0)
    for worker in workers:
        if worker.sentinel in ending:  # its files are closed, which is what was noticed; it is still going
            worker.join()
    codes = [worker.exitcode for worker in workers if worker.exitcode is not None]
    if not codes:
        return None
    if -signal.SIGBUS in codes:
        return UserError("a data worker ran out of shared memory: enlarge /dev/shm, or set workers=0")
    how = f"was ended by signal {-codes[0]}" if codes[0] < 0 else f"ended with status {codes[0]}"
    return UserError(f"a data worker {how}; the usual reason is a lack of memory: set fewer workers=, or 0")


def start_worker(worker: int) -> None:
    """Makes a worker process end with its parent and only with it; give it as `worker_init_fn`.

    A batch system or a terminal sends its signals to every process: what they mean for the run is up to the
    parent. When the parent is killed outright, a worker that lived on would keep its locks and its output.
    (On Linux the parent is the thread that started the worker: let that be one that stays.)
    """
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    for name in names:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it died before the line above
        os._exit(1)


class _StepNumbers(Sampler[int]):
    """Numbers of steps, without end where `stop` is None."""

    def __init__(self, start: int, stop: int | None) -> None:
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        return iter(itertools.count(self.start) if self.stop is None else range(self.start, self.stop))


@dataclass(frozen=True)
class _Steps(Dataset[Batch | UserError]):
    """One rank's batch of any step."""

    source: Source
    order: SampleOrder
    crop: MultiCrop
    seed: int
    global_batch: int
    rank: int
    world: int

    def __getitem__(self, step: int) -> Batch | UserError:
        """A `UserError` is returned, not raised: the loader would wrap it into a traceback of many lines."""
        return replace(self, crop=self.crop.at(self.seed, step))._batch(step)

    def _batch(self, step: int) -> Batch | UserError:
        local = self.global_batch // self.world
        first = step * self.global_batch + self.rank * local
        positions = range(first, first + local)
        replaced: list[tuple[str, str]] = []
        with _one_thread():
            try:
                samples = [self._sample(position, replaced) for position in positions]
            except UserError as error:
                return error
        rows, global_crops, local_crops, gram_crops, changes = zip(*samples, strict=True)
        return Batch(
            global_crops=torch.stack(global_crops, dim=1).flatten(0, 1),
            local_crops=torch.stack(local_crops, dim=1).flatten(0, 1),
            positions=torch.tensor(positions),
            rows=torch.tensor(rows),
            replaced=replaced,
            gram_crops=torch.stack(gram_crops, dim=1).flatten(0, 1) if self.crop.config.gram_size else None,
            changes=None if changes[0] is None else torch.stack(changes, dim=1).flatten(0, 1),
        )

    def _sample(
        self, position: int, replaced: list[tuple[str, str]]
    ) -> tuple[int, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Row and crops at a position; pictures that cannot be read are added to `replaced`."""
        row, picture = self._picture(position, replaced)
        seed = derive_seed("augment", self.seed, position)
        partner = self.crop.partner(self.seed, position, self.global_batch)
        other = None if partner is None else self._picture(partner, [])[1]
        gram = self.crop.undistorted(picture, seed) if self.crop.config.gram_size else None
        return row, *self.crop(picture, seed, other), gram, self.crop.changes(picture, seed)

    def _picture(self, position: int, replaced: list[tuple[str, str]]) -> tuple[int, Image.Image | Pixels]:
        """The row of the first readable picture for a position, and that picture."""
        row = last = self.order.sample(position)
        for attempt in range(REPLACEMENTS + 1):
            try:
                return row, self.crop.open(self.source.read(row))
            except Unreadable as reason:
                replaced.append((self.source.table["id"][row].as_py(), str(reason)))
                last, row = row, self.order.replacement(position, attempt)
        picture, reason = self.source.table["uri"][last].as_py(), replaced[-1][1]
        raise UserError(
            f"{REPLACEMENTS + 1} pictures in a row could not be read, the last of them {picture}: {reason}; "
            f"see whether {self.source.name} holds pictures"
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small tensors gain nothing from several threads; workers have one anyhow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
