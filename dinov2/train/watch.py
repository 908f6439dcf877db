"""What keeps a run in sight and within reach: stop signals, and the figures of a step."""

import resource
import signal
import time
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import NoReturn, Self

import torch
from torch import Tensor

from dinov2.config import one_of
from dinov2.exits import RunAgain
from dinov2.optim import Rates
from dinov2.parallel import all_sum, world
from dinov2.ssl.objective import Outcome
from dinov2.train.feed import Fed
from dinov2.train.state import State

PARTS = ("backbone", "dino_head", "ibot_head")


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


def figures(
    loss: Tensor, outcome: Outcome, norms: Sequence[Tensor], rates: Rates, fed: Fed, state: State
) -> dict[str, float]:
    """A step's line in metrics.jsonl: losses as means over ranks, norms, rates, speed."""
    shown = (
        {"loss": loss} | {f"loss.{name}": value for name, value in outcome.losses.items()} | outcome.figures
    )
    means = (
        all_sum(torch.stack([value.detach().float().to(loss.device) for value in shown.values()])) / world()
    )
    seconds = time.perf_counter() - fed.began
    return (
        dict(zip(shown, means.tolist(), strict=True))
        | {f"norm.{name}": float(norm) for name, norm in zip(PARTS, norms, strict=False)}
        | {
            "lr": rates.lr,
            "weight_decay": rates.weight_decay,
            "momentum": rates.momentum,
            "teacher_temperature": rates.teacher_temperature,
            "pictures_per_second": fed.pictures * world() / seconds,
            "waiting": fed.waited / seconds,
            "memory_gib": _memory(loss.device),
            "skipped": state.skipped,
            "replaced": len(fed.batch.replaced),
        }
    )


def _memory(device: torch.device) -> float:
    """Peak memory so far in GiB, of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
