"""Runs the demo's stages one after the other, each a program of its own, and remembers what is done."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinov2.exits import Stop
from dinov2.files import read_json, write_json

ROOT = Path(__file__).parents[1]


class StageFailed(Stop):
    """A program ended with an error, which it has described itself."""

    def __init__(self, name: str, status: int) -> None:
        super().__init__(f"{name} stopped with status {status}; what it said stands above")
        self.status = status if status > 0 else 128 - status


@dataclass(frozen=True)
class Stage:
    """A name, a line for the terminal, and what to do: commands to run or a function to call."""

    name: str
    says: str
    work: Sequence[list[str]] | Callable[[], None]


@dataclass
class Stages:
    """The stages of one folder. `stages.json` has the seconds of those that are done."""

    folder: Path
    began: float

    def run(self, stage: Stage) -> None:
        """Do the stage unless it is done."""
        done = self.seconds()
        if stage.name in done:
            self._say(f"{stage.says}: done before")
            return
        self._say(stage.says)
        start = time.perf_counter()
        if callable(stage.work):
            stage.work()
        else:
            for words in stage.work:
                _run(stage.name, words)
        write_json(self.folder / "stages.json", done | {stage.name: time.perf_counter() - start})

    def seconds(self) -> dict[str, float]:
        """Of each finished stage; of one that was stopped and continued, those of its last start."""
        path = self.folder / "stages.json"
        return read_json(path) if path.exists() else {}

    def _say(self, line: str) -> None:
        minutes, seconds = divmod(int(time.perf_counter() - self.began), 60)
        print(f"[{minutes:2d}:{seconds:02d}] {line}", flush=True)


def python(module: str, *words: str) -> list[str]:
    """The command that runs one of the project's programs."""
    return [sys.executable, "-m", module, *words]


def _run(name: str, words: list[str]) -> None:
    """Run a program, which ends when we do. What it prints for people goes to standard error."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    program = subprocess.Popen(
        words,
        stdout=sys.stderr,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        preexec_fn=_end_with_parent,
    )
    try:
        status = program.wait()
    except BaseException:
        program.terminate()
        program.wait()
        raise
    if status:
        raise StageFailed(name, status)


def _end_with_parent() -> None:
    """Linux ends the program if the demo is killed; otherwise it would go on, holding its folder's lock."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
