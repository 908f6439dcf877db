"""Work cut into pieces that are done or not done, shared out over processes."""

import importlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from threadpoolctl import threadpool_limits

from dinov2.console import progress
from dinov2.exits import UserError

T = TypeVar("T")


def run_pieces(
    work: Callable[[T], int],
    pieces: Sequence[T],
    *,
    workers: int,
    what: str,
    total: int,
    done: int,
    unit: str,
) -> None:
    """Call `work`, which returns how many units it did, on every piece, in any order.

    Linear algebra runs on one thread in each process, so that sums are the same for any number of workers.

    Args:
        workers: processes; 0 for one a core. With one, or one piece, everything runs in this process.
        total, done: units in all, and units finished by earlier runs, for the progress bar.
    """
    if not pieces:
        return
    workers = min(workers or cores(), len(pieces))
    with progress(total=total, initial=done, what=what, unit=unit) as bar:
        if workers == 1:
            with threadpool_limits(1):
                for piece in pieces:
                    bar.update(work(piece))
            return
        context = multiprocessing.get_context("spawn")  # a fork could copy locks that other threads hold
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
            try:
                for count in pool.map(work, pieces):
                    bar.update(count)
            except BrokenProcessPool:
                raise UserError(
                    f"{what}: a worker process was killed, most likely for want of memory; use fewer workers="
                ) from None


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _start_worker() -> None:
    importlib.import_module("numpy")  # only libraries that are loaded by now can be limited
    threadpool_limits(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent killed by SIGKILL cannot end its workers; without this they would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
