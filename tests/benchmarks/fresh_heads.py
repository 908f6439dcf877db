"""How much a fresh head's targets tell apart, by bottleneck, batch norm and teacher temperature.

    python -m tests.benchmarks.fresh_heads

Prints the table of docs/benchmarks/training.md: `told_apart.teacher` in nats (at most log 64 = 4.16) of the
Sinkhorn targets that a head with initial weights makes of 64 made-up CLS tokens, of which a part is common to
all. Seconds of one core; no pictures.
"""

import math
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import layer_norm

from dinov2.losses.targets import sinkhorn
from dinov2.models.heads import DINOHead
from dinov2.ssl.figures import figures

ROWS, DIM, HIDDEN, PROTOTYPES = 64, 192, 512, 256
SPREADS = 0.29, 0.97  # `features.std` at the start of `small_minutes`, and from step 250 on
TEMPERATURES = 0.04, 0.02, 0.01


def tokens(spread: float, generator: torch.Generator) -> Float[Tensor, "rows dim"]:
    """Tokens as after the backbone's norm, with `features.std` of about `spread`."""
    own = torch.randn(ROWS, DIM, generator=generator)
    common = torch.randn(DIM, generator=generator)
    return layer_norm(spread * own + math.sqrt(1 - spread**2) * common, (DIM,))


@torch.no_grad()
def told_apart(head: DINOHead, cls: Float[Tensor, "rows dim"], temperature: float) -> float:
    scores = head(cls)
    (targets,) = sinkhorn([scores], temperature)
    return figures([(targets.of(slice(None)), scores)], cls)["told_apart.teacher"].item()


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    print(f"| features.std | bottleneck | batch norm | {' | '.join(map(str, TEMPERATURES))} |")
    print("|---" * (3 + len(TEMPERATURES)) + "|")
    for spread, batch_norm, bottleneck in product(SPREADS, (False, True), (128, 32)):
        cls = tokens(spread, generator)
        head = DINOHead(DIM, HIDDEN, bottleneck, PROTOTYPES, batch_norm=batch_norm)
        head.init_weights(generator)
        found = [f"{told_apart(head, cls, each):.2f}" for each in TEMPERATURES]
        print(f"| {spread} | {bottleneck} | {'yes' if batch_norm else 'no'} | {' | '.join(found)} |")


if __name__ == "__main__":
    main()
