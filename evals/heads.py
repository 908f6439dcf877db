"""A grid of linear classifiers trained at once: every kind of feature x every learning rate.

The heads on one kind of feature are one matrix, [rates * classes, width]. Their scores are one product, and
so are their gradients, which the product adds to the momentum as it goes (on a CPU a few rates at a time).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dinov2.data.order import derive_seed

MOMENTUM = 0.9
INITIAL_STD = 0.01  # of the weights, as in the release; biases start at 0
CHUNK = 1024  # rows that are scored at once
CACHED = 2**20  # weights, 4 MiB, that are worked on together on a CPU


@dataclass(frozen=True)
class Kind:
    """A kind of feature: the columns of the full feature that its heads see."""

    blocks: int  # CLS tokens of so many last blocks
    mean_patch: bool  # with the mean of the last block's patch tokens
    columns: slice


class HeadGrid:
    """Softmax regression by SGD with momentum 0.9, no weight decay and a cosine schedule to zero.

    Heads are numbered kind by kind, and by learning rate within a kind. Each starts from weights that depend
    on the seed and its kind alone, so a head is the same whatever it is trained beside.
    """

    def __init__(
        self,
        kinds: Sequence[Kind],
        rates: Sequence[float],
        classes: int,
        *,
        iterations: int,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.kinds, self.rates, self.classes, self.iterations = list(kinds), list(rates), classes, iterations
        self.step = 0
        self._rows = torch.tensor(rates, device=device).repeat_interleave(classes)[:, None]  # a rate each
        self.weights = [self._initial(kind, seed).to(device) for kind in kinds]
        self.velocities = [torch.zeros_like(weight) for weight in self.weights]
        self._scores = self.weights[0].new_empty(0)

    def __len__(self) -> int:
        return len(self.kinds) * len(self.rates)

    @torch.no_grad()
    def train_step(self, features: Float[Tensor, "batch dim"], labels: Int[Tensor, "batch"]) -> None:
        """One step of every head on the mean cross-entropy of a batch."""
        decay = 0.5 * (1 + math.cos(math.pi * self.step / self.iterations))
        rows = torch.arange(len(labels), device=labels.device)
        for kind, weight, velocity in zip(self.kinds, self.weights, self.velocities, strict=True):
            inputs = _with_ones(features[:, kind.columns])
            for part in self._parts(weight):
                scores = torch.mm(inputs, weight[part].T, out=self._room(len(labels), part))
                gradient = scores.view(len(labels), -1, self.classes).softmax(dim=2)
                gradient[rows, :, labels] -= 1
                velocity[part].addmm_(gradient.flatten(1).T, inputs, beta=MOMENTUM, alpha=1 / len(labels))
                weight[part].addcmul_(velocity[part], self._rows[part], value=-decay)
        self.step += 1

    @torch.no_grad()
    def predict(
        self, features: Float[Tensor, "n dim"], allowed: Bool[Tensor, "classes"] | None = None
    ) -> Int[Tensor, "heads n"]:
        """The class, of those allowed, that each head gives to each row; -1 from heads that have diverged."""
        barred = None if allowed is None or allowed.all() else ~allowed.to(self.weights[0].device)
        answers = torch.empty(len(self), len(features), dtype=torch.int64, device=self.weights[0].device)
        for start in range(0, len(features), CHUNK):
            part = slice(start, start + CHUNK)
            for number, (kind, weight) in enumerate(zip(self.kinds, self.weights, strict=True)):
                scores = _with_ones(features[part, kind.columns].to(weight)) @ weight.T
                scores = scores.view(len(scores), len(self.rates), self.classes)
                sound = scores.isfinite().all(dim=2)
                if barred is not None:
                    scores = scores.masked_fill(barred, -torch.inf)
                best = scores.argmax(dim=2).masked_fill_(~sound, -1)
                answers[number * len(self.rates) : (number + 1) * len(self.rates), part] = best.T
        return answers

    def _parts(self, weight: Tensor) -> list[slice]:
        """The rows of a few rates at a time, which stay in a processor's cache from one use to the next.

        Otherwise a step is limited by memory. Elsewhere than on the CPU, all rows at once.
        """
        a_rate = weight.shape[1] * self.classes
        together = max(1, CACHED // a_rate) if weight.device.type == "cpu" else len(self.rates)
        size = together * self.classes
        return [slice(start, min(start + size, len(weight))) for start in range(0, len(weight), size)]

    def _room(self, rows: int, part: slice) -> Float[Tensor, "rows all_classes"]:
        """Room for scores: fresh memory would take a sixth of the time of the product."""
        columns = part.stop - part.start
        if self._scores.numel() < rows * columns:
            self._scores = self.weights[0].new_empty(rows * columns)
        return self._scores[: rows * columns].view(rows, columns)

    def describe(self, head: int) -> dict[str, float | int | bool]:
        """What distinguishes this head."""
        kind, rate = divmod(head, len(self.rates))
        return {
            "blocks": self.kinds[kind].blocks,
            "mean_patch": self.kinds[kind].mean_patch,
            "learning_rate": self.rates[rate],
        }

    def state(self) -> dict[str, Tensor]:
        """All that training goes on from."""
        tensors = {f"weight.{number}": weight for number, weight in enumerate(self.weights)}
        tensors |= {f"velocity.{number}": velocity for number, velocity in enumerate(self.velocities)}
        return tensors | {"step": torch.tensor(self.step)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, tensors in (("weight", self.weights), ("velocity", self.velocities)):
            for number, tensor in enumerate(tensors):
                tensor.copy_(state[f"{name}.{number}"])
        self.step = int(state["step"])

    def _initial(self, kind: Kind, seed: int) -> Float[Tensor, "rows width"]:
        """The same weights for every rate, and a last column for the bias."""
        generator = torch.Generator().manual_seed(
            derive_seed("head", seed, kind.blocks, int(kind.mean_patch))
        )
        width = kind.columns.stop - kind.columns.start
        one = torch.randn(self.classes, width, generator=generator) * INITIAL_STD
        return _with_ones(one, fill=0.0).repeat(len(self.rates), 1)


def _with_ones(rows: Tensor, fill: float = 1.0) -> Tensor:
    """A last column of ones, so that the bias is a weight like the others."""
    return torch.cat([rows, rows.new_full((len(rows), 1), fill)], dim=1)
