"""A run that stands still ends, and says which rank it waits for.

Each rank leaves a heartbeat in the run's folder, `.ranks/3.json`: the step that it is at, what it is doing,
and for how long. A thread writes it, so that a rank whose main thread hangs goes on beating, and one that is
stopped, or whose machine is gone, does not. Ranks that stand still for longer than the limit look at the
others' heartbeats: the one that they wait for does not beat, is at an earlier step, reads data while they
compute, or is not inside a collective while they are. Clocks of different machines are never compared.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from dinov2.checkpoint import Checkpoints
from dinov2.exits import NoProgress, RunAgain, Stop
from dinov2.parallel import rank, world

T = TypeVar("T")
READING, COMPUTING = "waits for data", "computes"
LIBRARY = Path(os.__file__).parent
LONGER = 20  # times the limit for what may take long: starting, k-NN, the last checkpoint


class Heartbeat:
    """Watches this rank and, when it stands still, the others, while it is entered.

    A run that stands still ends with status 75 if it has saved a checkpoint since it was started, since
    running it again gets further; else with 70.

    Args:
        limit: seconds without a step after which the run ends; 0 for no watching.
    """

    def __init__(self, folder: Path, checkpoints: Checkpoints, *, limit: float) -> None:
        self.folder, self.checkpoints, self.limit = folder / ".ranks", checkpoints, limit
        self.pause = min(10.0, limit / 10)
        self.saved = checkpoints.steps()[-1:]
        self.step, self.doing, self.since, self.allowed = 0, "starts", time.monotonic(), LONGER * limit
        self.beats, self.left, self.blamed = 0, "", ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        if self.limit:
            self.folder.mkdir(exist_ok=True)
            self._beat()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.limit:
            return
        lost = isinstance(error, RuntimeError) and world() > 1  # what collectives raise when a rank is gone
        found = self._gone() if lost else ""
        self._end.set()
        self._thread.join()
        self.left = found or (f"{kind.__name__}: {error}" if kind else "done")
        self._beat()
        if found:
            raise self._stop(found) from error

    def over(self, batches: Iterable[T], first: int) -> Iterator[T]:
        """The same batches; time between them counts as waiting for data, the rest as computing."""
        stream = iter(batches)
        for step in range(first, sys.maxsize):
            self._set(step, READING)
            try:
                batch = next(stream)
            except StopIteration:
                self._set(step, "ends", LONGER)
                return
            self._set(step, COMPUTING)
            yield batch

    @contextmanager
    def busy(self, doing: str) -> Iterator[None]:
        """What is done inside may take longer, and the others wait for it."""
        self._set(self.step, doing, LONGER)
        yield
        self._set(self.step, COMPUTING)

    def _set(self, step: int, doing: str, longer: float = 1.0) -> None:
        self.step, self.doing, self.since, self.allowed = step, doing, time.monotonic(), longer * self.limit

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._end.wait(self.pause):
            now = time.monotonic()
            if now - before > 5 * self.pause:  # the process itself was stopped, with the others perhaps
                self.since = now
            before = now
            self._beat()
            if now - self.since > self.allowed:
                self._stuck()

    def _stuck(self) -> None:
        """Name who is waited for and end the process; return if it is somebody who may take longer."""
        ranks, silent = self._look()
        mine = ranks[rank()]
        if any(one["long"] for place, one in ranks.items() if place not in silent):
            return
        line = _blame(ranks, silent, mine)
        if time.monotonic() - self.since <= self.allowed:
            return  # it went on while we looked
        stop = self._stop(line)
        self.left = self.blamed = line
        self._beat()
        print(f"dinov2 train: {stop}", file=sys.stderr, flush=True)
        os._exit(stop.status)

    def _stop(self, line: str) -> Stop:
        if self.checkpoints.steps()[-1:] != self.saved:
            return RunAgain(f"{line}; the same command continues from the last checkpoint")
        return NoProgress(f"{line}; no checkpoint was saved since the start")

    def _gone(self) -> str:
        """Who left or fell silent when a collective failed here; empty if all the others are there."""
        ranks, silent = self._look()
        left = {place: one["left"] for place, one in ranks.items() if one["left"] and place != rank()}
        if blamed := _blamed(ranks):
            return blamed
        if left:
            place = min(left)
            return f"rank {place} has left at step {ranks[place]['step']} ({left[place][:200]})"
        return f"rank {silent[0]} is gone, last seen at step {ranks[silent[0]]['step']}" if silent else ""

    def _look(self) -> tuple[dict[int, dict[str, Any]], list[int]]:
        """All heartbeats, and the ranks that have none or do not beat any more."""
        before = self._read()
        wait = time.monotonic() + 3 * self.pause
        while time.monotonic() < wait:
            time.sleep(self.pause / 2)
            self._beat()
        after = self._read()
        silent = [
            place
            for place in range(world())
            if place != rank()
            and not after[place]["left"]
            and before[place]["beats"] == after[place]["beats"]
        ]
        return after, silent

    def _read(self) -> dict[int, dict[str, Any]]:
        found = {}
        for place in range(world()):
            found[place] = {"beats": -1, "step": 0, "doing": "starts", "left": "", "long": False, "for": 0.0}
            found[place] |= {"at": "", "in_collective": False, "blamed": ""}
            with suppress(OSError, ValueError):
                found[place] |= json.loads((self.folder / f"{place}.json").read_text())
        return found

    def _beat(self) -> None:
        self.beats += 1
        now = {
            "beats": self.beats,
            "step": self.step,
            "doing": self.doing,
            "for": round(time.monotonic() - self.since, 1),
            "long": self.allowed > self.limit and time.monotonic() - self.since < self.allowed,
            "left": self.left,
            "blamed": self.blamed,
            **_whereabouts(),
        }
        path = self.folder / f"{rank()}.json"
        with suppress(OSError):  # a disk that is full for a moment is not the end
            part = path.with_suffix(f".part{threading.get_ident()}")
            part.write_text(json.dumps(now))
            os.replace(part, path)


def _blame(ranks: dict[int, dict[str, Any]], silent: list[int], mine: dict[str, Any]) -> str:
    stood = f"no step for {mine['for']:.0f} s"
    if blamed := _blamed(ranks):
        return blamed
    if silent:
        one = ranks[silent[0]]
        who = ", ".join(map(str, silent))
        return f"{stood}: rank {who} does not answer, last seen at step {one['step']} where it {one['doing']}"
    left = [place for place, one in ranks.items() if one["left"]]
    if left:
        return f"{stood}: rank {left[0]} has left ({ranks[left[0]]['left'][:200]})"
    order = {
        place: (one["step"], one["doing"] != READING, one["in_collective"]) for place, one in ranks.items()
    }
    last = [place for place in order if order[place] == min(order.values())]
    if len(last) == len(ranks) > 1:
        return f"{stood}: all {len(ranks)} ranks stand at step {mine['step']} where each {mine['doing']}"
    one = ranks[last[0]]
    who = f"rank {', '.join(map(str, last))} {one['doing']}"
    return f"{stood}: {who} at step {one['step']} for {one['for']:.0f} s (at {one['at']})"


def _blamed(ranks: dict[int, dict[str, Any]]) -> str:
    """Whom a rank named that ended for it: the reason is there, not with the one that ended."""
    return next((one["blamed"] for one in ranks.values() if one["blamed"]), "")


def _whereabouts() -> dict[str, Any]:
    """Where the main thread is: the innermost line that is no library's; whether it waits for others."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    in_collective = False
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if not {"site-packages", "dist-packages"} & set(path.parts) and not path.is_relative_to(LIBRARY):
            at = "/".join(path.parts[-2:])
            return {"at": f"{at}:{frame.f_lineno}", "in_collective": in_collective}
        in_collective = in_collective or "distributed" in path.parts
        frame = frame.f_back
    return {"at": "", "in_collective": in_collective}
