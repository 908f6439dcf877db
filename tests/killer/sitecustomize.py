"""Loaded by every Python process of a command under `tests.faults`: dies once a watched file got its name.

The death is real: SIGKILL for the whole process group, from within, at the first thing that the interpreter
does after the rename. Watching from outside would depend on how busy the machine is.
"""

import os
import signal
import sys
from fnmatch import fnmatch
from typing import Any

PATTERN = os.environ.get("KILL_WHEN_RENAMED", "")  # absolute, with * and ?
THERE = set(os.environ.get("KILL_EXCEPT", "").split(os.pathsep))  # files that were there from the start


class _Killer:
    renamed = False

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.renamed:
            self.renamed = False  # to kill is an event, too
            os.killpg(os.getpgid(0), signal.SIGKILL)
        if event == "os.rename":
            path = os.path.abspath(os.fsdecode(args[1]))
            self.renamed = fnmatch(path, PATTERN) and path not in THERE


if PATTERN:
    sys.addaudithook(_Killer())
