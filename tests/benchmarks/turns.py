"""Programs that take steps in turn, so that what slows the machine down slows all of them.

A program prints a line of figures after each step and waits for a line before the next. A turn thus holds
the step, and whatever the program does before it.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from typing import Any

from tests.benchmarks.figures import ROOT, peak_memory

SIGN = "turn: "  # what its lines of figures begin with


def next_turn(said: dict[str, Any]) -> bool:
    """Tell the figures of a step, and wait; false where there is no other turn."""
    # On a line of its own, whatever a bar of progress has written.
    print("\n" + SIGN + json.dumps(said | {"gib": peak_memory()}), flush=True)
    return bool(sys.stdin.readline())


def in_turn(programs: dict[str, list[str]], steps: int) -> dict[str, dict[str, Any]]:
    """So many steps of each program: lists of their figures by name, the last peak memory as `gib`."""
    with ExitStack() as stack:
        turns = {name: stack.enter_context(_Program(words)) for name, words in programs.items()}
        found: dict[str, dict[str, Any]] = {name: defaultdict(list) for name in programs}
        for _ in range(steps):
            for name, program in turns.items():
                for what, figure in program.step().items():
                    found[name][what].append(figure)
    return {name: {**said, "gib": max(said["gib"])} for name, said in found.items()}


class _Program:
    """A process that is started by its first turn."""

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self.child: subprocess.Popen[str] | None = None

    def __enter__(self) -> "_Program":
        self.errors = tempfile.TemporaryFile("w+")
        return self

    def __exit__(self, *raised: object) -> None:
        if self.child is not None:
            self.child.kill()  # what it would still write at its end is nobody's business
            self.child.communicate()
        self.errors.close()

    def step(self) -> dict[str, Any]:
        if self.child is None:
            self.child = subprocess.Popen(
                self.words,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                text=True,
            )
        else:
            assert self.child.stdin is not None
            print(file=self.child.stdin, flush=True)
        assert self.child.stdout is not None
        for line in self.child.stdout:
            if line.startswith(SIGN):
                return json.loads(line.removeprefix(SIGN))
        self.errors.seek(0)
        sys.exit(f"{' '.join(self.words)} failed:\n{self.errors.read()[-2000:]}")
