"""What a task's file defines as `TASK`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from evals.config import EvalConfig


@dataclass(frozen=True)
class Task:
    """An evaluation protocol.

    Attributes:
        config: its settings, a subclass of `EvalConfig`.
        data: opens what the settings name; the result has `sources`, by which results are told apart.
        run: takes the `Bench`, the data, the settings, and a folder that a killed command continues from;
            gives an `Outcome`.
        summary: what it is, in one line.
    """

    config: type[EvalConfig]
    data: Callable[[Any], Any]
    run: Callable[..., Any]
    summary: str
