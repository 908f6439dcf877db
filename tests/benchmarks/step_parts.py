"""Where the time of a training step goes, and what each part could not go below.

The floor of matrix products is their operations over the rate of a large product, that of passes through
memory their bytes over the rate of a large copy, both measured by the same process.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from dinov2.data.augment import normalise
from dinov2.models.config import ViTConfig
from dinov2.ssl.objective import Views
from dinov2.train.config import TrainConfig
from dinov2.train.cost import head_flops, vit_flops
from dinov2.train.state import State
from tests.benchmarks.figures import Rows, product_rate
from tests.benchmarks.step import BATCH, one_step, prepared

PASSES = {"clipping": 4, "optimiser": 28, "average (EMA)": 12}  # bytes a parameter that are read and written


class Clock:
    """Seconds by part; what is timed inside of another part is taken off it."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self.inner: list[float] = []

    def around(self, owner: Any, name: str, part: str) -> None:
        """Have the time of a function, an attribute of `owner`, counted as that part's."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **named: Any) -> Any:
            self.inner.append(0.0)
            start = time.perf_counter()
            given = function(*args, **named)
            whole = time.perf_counter() - start
            self.spent[part] += whole - self.inner.pop()
            if self.inner:
                self.inner[-1] += whole
            return given

        setattr(owner, name, timed)


def rows(steps: int) -> Rows:
    """The median of each part of our default step, its share, and its floor."""
    config, state, shown = prepared([])
    clock, found = _watched(state), []
    for step in range(steps + 1):
        clock.spent.clear()
        whole = sum((taken := one_step(config, state, shown, step + 1)).values())
        parts = dict(clock.spent) | {name: taken[name] for name in ("backward", "clipping")}
        parts["losses"] = taken["forward"] - sum(clock.spent[name] for name in INSIDE)
        parts["optimiser"] = taken["optimiser and teacher"] - clock.spent["average (EMA)"]
        parts["data, to the device and normalised"] = _normalising(shown)
        found.append(parts | {"step": whole})
    floors = _floors(config, state, shown)
    middle = {name: statistics.median(parts[name] for parts in found[1:]) for name in found[0]}
    table = []
    for name, seconds in middle.items():
        floor = f", floor {floors[name]:.3f} s, {floors[name] / seconds:.0%}" if name in floors else ""
        table.append((name, f"{seconds:.3f} s, {seconds / middle['step']:.1%} of the step{floor}"))
    return table


INSIDE = ("teacher", "student's backbone", "student's heads")


def _watched(state: State) -> Clock:
    import tests.benchmarks.step as step

    clock = Clock()
    clock.around(state.teacher, "forward", "teacher")
    clock.around(state.student, "forward", "student's heads")
    clock.around(state.student.backbone, "forward_packed", "student's backbone")
    clock.around(step, "update_average", "average (EMA)")
    return clock


def _normalising(shown: Views) -> float:
    crops = [torch.zeros(own.shape, dtype=torch.uint8) for own in shown.crops()]
    start = time.perf_counter()
    for own in crops:
        normalise(own, (0.5,) * 3, (0.5,) * 3)
    return time.perf_counter() - start


def _floors(config: TrainConfig, state: State, shown: Views) -> dict[str, float]:
    vit, head = config.network(), config.heads.dino
    assert isinstance(vit, ViTConfig) and shown.masks is not None
    masked = int(shown.masks.sum())
    seen = BATCH * 2 * vit_flops(vit, 224, finished=1 + masked / BATCH / 2)
    small = BATCH * 8 * vit_flops(vit, 98, finished=1)
    prototypes = 2.0 * head.bottleneck * head.prototypes  # of a token, out of the head's whole
    mlp = head_flops(head, vit.dim) - prototypes
    student = (seen + small) * (1 - vit.drop_path)
    heads = (10 * BATCH + masked) * mlp
    products = {
        "teacher": seen + (2 * BATCH + masked) * mlp,
        "student's backbone": student,
        "student's heads": heads,
        "losses": (2 * BATCH + masked + 3 * (10 * BATCH + masked)) * prototypes,
        "backward": 2 * (student + heads),
    }
    rate = max(product_rate(vit.dim, torch.bfloat16) for _ in range(2))
    parameters = sum(parameter.numel() for parameter in state.student.parameters())
    copies = _copy_rate()
    passes = {name: size * parameters / copies for name, size in PASSES.items()}
    pixels = sum(own.numel() for own in shown.crops())
    floors = {name: count / rate for name, count in products.items()} | passes
    floors["data, to the device and normalised"] = 5 * pixels / copies
    return floors | {"step": sum(floors.values())}


def _copy_rate() -> float:
    """Bytes a second that a large copy reads and writes."""
    source, target = torch.zeros(2**26), torch.zeros(2**26)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * 4 * 2**26 / best
