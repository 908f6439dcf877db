"""Runs the demo's stages one after the other, each a program of its own, and remembers what is done."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov2.exits import Stop
from dinov2.files import read_json, write_json

ROOT = Path(__file__).parents[1]
FILE = "stages.json"


class StageFailed(Stop):
    """A program ended with an error, which it has described itself."""

    def __init__(self, name: str, status: int) -> None:
        super().__init__(f"{name} stopped with status {status}; what it said stands above")
        self.status = status if status > 0 else 128 - status


Commands = list[list[str]]


@dataclass(frozen=True)
class Stage:
    """A name, a line for the terminal, and the work: done at once, or the commands to run for it."""

    name: str
    says: str
    work: Callable[[], Commands | None]


@dataclass
class Stages:
    """The stages of one folder. `stages.json` has place, seconds and commands of those that are done."""

    folder: Path
    began: float

    def run(self, stage: Stage) -> None:
        """Do the stage unless it is done."""
        done = read_stages(self.folder)
        if stage.name in done:
            self.say(f"{stage.says}: done before")
            return
        self.say(stage.says)
        start = time.perf_counter()
        commands = stage.work() or []
        for words in commands:
            _run(self.folder / "logs" / f"{stage.name}.txt", words)
        facts = {
            "place": len(done),
            "seconds": time.perf_counter() - start,
            "commands": [words[2:] for words in commands],
        }
        write_json(self.folder / FILE, done | {stage.name: facts})

    def say(self, line: str) -> None:
        """A line for the terminal with the time since the demo began."""
        minutes, seconds = divmod(int(time.perf_counter() - self.began), 60)
        print(f"[{minutes:2d}:{seconds:02d}] {line}", flush=True)


def read_stages(folder: Path) -> dict[str, dict[str, Any]]:
    """What is done, in that order. A stage that was continued has the seconds of its last start."""
    path = folder / FILE
    done = read_json(path) if path.exists() else {}
    return dict(sorted(done.items(), key=lambda item: item[1].get("place", 0)))


def python(module: str, *words: str) -> list[str]:
    """The command that runs one of the project's programs."""
    return [sys.executable, "-m", module, *words]


def _run(log: Path, words: list[str]) -> None:
    """Run a program, which ends when we do. What it prints goes to its log, its progress to the terminal."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Threads that spin while they wait make training on a busy machine several times slower.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if sys.stderr.isatty():
        environment["TQDM_LEAVE"] = ""  # a bar that is full makes room for the next
    log.parent.mkdir(exist_ok=True)
    with open(log, "a") as file:
        program = subprocess.Popen(words, stdout=file, env=environment, preexec_fn=_end_with_parent)
        try:
            status = program.wait()
        except BaseException:
            program.terminate()
            program.wait()
            raise
    if status:
        raise StageFailed(log.stem, status)


def _end_with_parent() -> None:
    """Linux ends the program if the demo is killed; otherwise it would go on, holding its folder's lock."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
