"""What keeps a run safe and in sight: the gate before the update, stop signals, and the figures of a step."""

import logging
import math
import resource
import signal
import time
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import NoReturn, Self

import torch
from torch import Tensor

from dinov2.config import one_of
from dinov2.exits import NoProgress, RunAgain
from dinov2.optim import Rates
from dinov2.parallel import all_max, all_sum, world
from dinov2.ssl.objective import Outcome
from dinov2.train.feed import Fed
from dinov2.train.state import State

PARTS = ("backbone", "dino_head", "ibot_head")
log = logging.getLogger(__name__)


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


def agree(loss: Tensor, norms: Sequence[Tensor], stop: bool) -> tuple[bool, bool]:
    """Whether loss and gradients are finite on every rank, and whether any rank was asked to stop.

    One collective of two numbers, so that all ranks apply or skip a step together, and save the same one.
    """
    finite = torch.isfinite(torch.stack([loss.detach().float(), *(norm.float() for norm in norms)])).all()
    flags = all_max(torch.stack([~finite, torch.tensor(stop, device=loss.device)]).float())
    bad, stopping = flags.tolist()
    return not bad, bool(stopping)


def count(state: State, finite: bool, outcome: Outcome, fed: Fed, *, limit: int) -> None:
    """Keep count of steps that were not applied, name them, and give up after `limit` in a row.

    Raises:
        NoProgress: says which losses were not finite, and where.
    """
    if finite:
        state.skipped_in_a_row = 0
        return
    state.skipped += 1
    state.skipped_in_a_row += 1
    bad = [name for name, loss in outcome.losses.items() if not math.isfinite(float(loss))]
    what = ("loss " + ", ".join(bad) if bad else "gradient") + " not finite"
    rows = ", ".join(map(str, fed.batch.rows.tolist()[:8]))
    log.warning("step %d skipped: %s (rows %s …)", state.step, what, rows)
    if state.skipped_in_a_row >= limit:
        raise NoProgress(
            f"{limit} steps in a row were not finite, last at step {state.step}: {what}; "
            "usual causes are too high an optim.lr or damaged data"
        )


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
