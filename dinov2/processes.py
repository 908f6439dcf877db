"""Child processes that end together: a program once for each rank, on this machine or in a job's task."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from types import FrameType

FORWARDED = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
GRACE = 30.0  # seconds that ranks have to end after one of them failed
POLL = 0.05


def run_all(command: Sequence[str], ranks: Sequence[Mapping[str, str]]) -> int:
    """Run the command once for each rank, with its variables added to the environment, and wait for all.

    A signal to this process reaches every child, so that all can agree to save. When one fails, the others,
    who would wait for it for ever, are asked to end, and killed after a while.

    Returns:
        the status of the first that failed, 128 + n where signal n ended it; 0 if all did well.
    """
    children: list[subprocess.Popen[bytes]] = []
    early: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        early.append(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        for rank in ranks:
            children.append(subprocess.Popen(list(command), env={**os.environ, **rank}))
            for number in early:
                children[-1].send_signal(number)
        return _wait(children)
    finally:
        for child in children:
            child.kill()
            child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def ranks_here(count: int) -> list[dict[str, str]]:
    """torch's variables for `count` ranks on this machine, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    world = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [place | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _wait(children: Sequence["subprocess.Popen[bytes]"]) -> int:
    first, until = 0, float("inf")
    while running := [child for child in children if child.poll() is None]:
        failed = [child.returncode for child in children if child.returncode]
        if failed and not first:
            first, until = failed[0], time.monotonic() + GRACE
            for child in running:
                child.terminate()
        if time.monotonic() > until:
            for child in running:
                child.kill()
        time.sleep(POLL)
    status = first or next((child.returncode for child in children if child.returncode), 0)
    return 128 - status if status < 0 else status
