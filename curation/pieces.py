"""Work cut into pieces that are done or not done, shared out over processes."""

import importlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import TypeVar

from threadpoolctl import threadpool_limits

from dinov2.console import progress
from dinov2.exits import UserError

P = TypeVar("P", bound=Sized)
Q = TypeVar("Q")
T = TypeVar("T")


class Workers:
    """Processes that a run's stages share. They start when first needed, or told, and end with the block.

    Linear algebra runs on one thread in each, so that sums are the same for any number of them.
    """

    def __init__(self, count: int) -> None:
        """`count`: processes; 0 for one a core. With one, the work is done in this process."""
        self.count = count or cores()
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def start(self, work: Callable[[P], int]) -> None:
        """Let the processes start, and import what `work` needs, while this one does something else."""
        if self.count > 1:
            for _ in range(self.count):  # the pool starts a process for a task that finds none idle
                self._started().submit(_arrived, work)

    def do(
        self, work: Callable[[P], int], pieces: Sequence[P], *, what: str, total: int, unit: str = "picture"
    ) -> None:
        """Call `work`, which returns the piece's length, on every piece.

        Args:
            pieces: those that earlier runs have not done.
            total: units in all, for the progress bar.

        Raises:
            UserError: a process was killed.
        """
        if not pieces:
            return
        done = total - sum(map(len, pieces))
        with progress(total=total, initial=done, what=what, unit=unit) as bar:
            if self.count == 1 or len(pieces) == 1:
                with threadpool_limits(1):
                    for piece in pieces:
                        bar.update(work(piece))
                return
            try:
                for count in self._started().map(work, pieces):
                    bar.update(count)
            except BrokenProcessPool:
                raise _killed(what) from None

    def ahead(self, work: Callable[[Q], T], asked: Sequence[Q], *, what: str) -> Iterator[T]:
        """What `work` makes of each, in turn; a process is always one ahead of who takes them.

        With one process, each is made when it is asked for.

        Raises:
            UserError: a process was killed.
        """
        if self.count == 1 or not asked:
            return self.here(work, asked)
        return self._ahead(work, asked, self._started().submit(work, asked[0]), what)

    def here(self, work: Callable[[Q], T], asked: Iterable[Q]) -> Iterator[T]:
        """The same in this process, when it is asked for."""
        for each in asked:
            with threadpool_limits(1):
                made = work(each)
            yield made

    def _ahead(
        self, work: Callable[[Q], T], asked: Sequence[Q], coming: "Future[T]", what: str
    ) -> Iterator[T]:
        for after in [*asked[1:], None]:
            try:
                made = coming.result()
            except BrokenProcessPool:
                raise _killed(what) from None
            if after is not None:
                coming = self._started().submit(work, after)
            yield made

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # a fork could copy locks that other threads hold
            self._pool = ProcessPoolExecutor(self.count, mp_context=context, initializer=_start_worker)
        return self._pool


def _killed(what: str) -> UserError:
    return UserError(
        f"{what}: a worker process was killed, most likely for want of memory; use fewer workers="
    )


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _start_worker() -> None:
    importlib.import_module("numpy")  # only libraries that are loaded by now can be limited
    threadpool_limits(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _arrived(work: Callable[[P], int]) -> None:
    """Nothing is left to do: a function that arrives in a process has brought its module."""


def _end_with_parent() -> None:
    """A parent killed by SIGKILL cannot end its workers; without this they would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
