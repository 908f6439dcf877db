"""What a run says of itself: the metrics of a step, those that are measured now and then, and warnings."""

import logging
import math
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2.data.sources import Source
from dinov2.optim import Rates
from dinov2.parallel import all_gather, all_sum, is_main, world
from dinov2.ssl.objective import Outcome
from dinov2.train.config import TrainConfig
from dinov2.train.cost import measured_flops, peak_flops, work_of
from dinov2.train.feed import Fed
from dinov2.train.hang import Heartbeat
from dinov2.train.health import KEPT, Health, spread
from dinov2.train.knn import KnnWatch
from dinov2.train.snapshots import Snapshots
from dinov2.train.state import State

PARTS = ("backbone", "dino_head", "ibot_head")
SLOW = 0.5  # of the median rank's rate
WAITS = 0.3  # of the time of a step
log = logging.getLogger(__name__)


class Watch:
    """Makes each step's line of metrics, with what is measured only now and then, and warns."""

    def __init__(
        self, config: TrainConfig, folder: Path, source: Source, state: State, heart: Heartbeat
    ) -> None:
        self.config, self.steps, self.heart = config, config.length(len(source)), heart
        self.device = next(state.student.parameters()).device
        self.knn = KnnWatch(config, self.device)
        self.snapshots = Snapshots(config, folder, source, self.steps)
        self.health = Health(
            folder,
            state.step,
            warm=max(round(config.optim.warmup * self.steps), 2 * KEPT),
            most=math.log(config.heads.dino.prototypes),
        )
        self.work = work_of(config)
        self.peak = peak_flops(config, self.device) if self.work else 0.0
        self.pace = 0.0  # seconds a step, averaged over about the last hundred

    def start(self, state: State) -> dict[str, float]:
        """The line of step 0: what fresh weights do."""
        self.snapshots.take(state)
        return self.knn.of(state)

    def step(
        self, loss: Tensor, outcome: Outcome, norms: Sequence[Tensor], rates: Rates, fed: Fed, state: State
    ) -> dict[str, float]:
        """The line of the step that led to `state`: means over the ranks, all of which call it."""
        line = _means({"loss": loss} | _named("loss", outcome.losses) | outcome.figures)
        line |= _named("norm", dict(zip(PARTS, map(float, norms), strict=False)))
        line |= asdict(rates) | self._speed(fed, state.step)
        line |= {"ranks": world(), "skipped": state.skipped, "replaced": len(fed.batch.replaced)}
        if is_main():
            self.health.see(state.step, line)
        if state.step % self.config.watch.every == 0 or state.step == self.steps:
            line |= spread(outcome.features)
            name_slow_ranks(state.step, line["waiting"], measured_flops(self.device, torch.float32))
        if self.knn.due(state.step, self.steps):
            with self.heart.busy("measures k-NN"):
                line |= self.knn.of(state)
        self.snapshots.take(state)
        return line

    def _speed(self, fed: Fed, step: int) -> dict[str, float]:
        seconds = time.perf_counter() - fed.began
        self.pace += (seconds - self.pace) * (0.01 if self.pace else 1.0)
        rate = fed.pictures * world() / seconds
        speed = {
            "pictures_per_second": rate,
            "seconds_left": (self.steps - step) * self.pace,
            "waiting": fed.waited / seconds,
            "memory_gib": _memory(self.device),
        }
        if self.work:
            speed["tokens_per_second"] = self.work.tokens * rate
            speed["utilisation"] = self.work.flops * rate / (self.peak * world())
        return speed


def name_slow_ranks(step: int, waiting: float, rate: float) -> None:
    """Log ranks that are far behind the median of all: every step takes as long as the slowest one's.

    Args:
        waiting: the share of this step that this rank waited for data.
        rate: of matrix products, measured on every rank just now, in FLOP/s.
    """
    if world() == 1:
        return
    everyone = all_gather(torch.tensor([[waiting, rate]], dtype=torch.float64))
    usual = everyone.median(dim=0).values.tolist()
    for place, (share, own) in enumerate(everyone.tolist()):
        if own < SLOW * usual[1]:
            what = f"matrix products at {own / usual[1]:.0%} of the median rank's rate"
            log.warning("step %d: rank %d is slow: %s", step, place, what)
        if share > WAITS and share > usual[0] / SLOW:
            what = f"waits for data {share:.0%} of the time, the median rank {usual[0]:.0%}"
            log.warning("step %d: rank %d is slow: %s", step, place, what)


def _named(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{kind}.{name}": value for name, value in values.items()}


def _means(values: dict[str, Tensor]) -> dict[str, float]:
    """Means over ranks, by one collective."""
    device = values["loss"].device
    stacked = torch.stack([value.detach().float().to(device) for value in values.values()])
    return dict(zip(values, (all_sum(stacked) / world()).tolist(), strict=True))


def _memory(device: torch.device) -> float:
    """Peak memory so far in GiB, of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # getrusage begins with what the parent held
        return (
            next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
            / 2**20
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
