"""Signals that ask a run to save and leave."""

import signal
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import NoReturn, Self

from dinov2.config import one_of
from dinov2.exits import RunAgain


class StopSignals:
    """While it is entered, the named signals only set `asked`; the loop leaves at a step of its choosing."""

    def __init__(self, names: Sequence[str]) -> None:
        known = {name.name for name in signal.Signals}
        self.signals = [signal.Signals[one_of(name, known, "signals")] for name in names]
        self.asked = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        for number in self.signals:
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]  # what signal() itself returned

    def leave(self, step: int, steps: int) -> NoReturn:
        raise RunAgain(f"asked to stop; saved at step {step} of {steps}; the same command continues")

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
