"""Whether a run collapses, and how spread its features are."""

import json
import logging
from collections import deque
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from dinov2.logs import cut_lines, read_metrics
from dinov2.parallel import all_gather, is_main

KEPT = 10  # steps that a judgement is made of
ALIKE = 0.005  # nats; healthy runs stay above 0.02, collapsed ones reach 0.001 within some ten steps
FELL = 0.05  # share of what it once was
KINDS = {
    "one prototype": (
        "all crops choose the same prototypes (entropy {entropy:.2f} of {most:.2f} nats). Usual causes: "
        "targets that are not centred (`teacher.center_momentum` of 1, or too near it for the run's length), "
        "or a `teacher.temperature` below 0.04"
    ),
    "uniform": (
        "every crop gets all prototypes alike (entropy {entropy:.2f} of {most:.2f} nats). Usual causes: "
        "targets that are not sharp (`teacher.temperature` of 0.1 or more), too high an `optim.lr`, or a "
        "`teacher.momentum` so low that the teacher follows the student's noise"
    ),
}
log = logging.getLogger(__name__)


class Health:
    """Warns of a collapse in the making: once for each, in the log and in `warnings.jsonl`.

    The sign is `told_apart.student`, the mutual information between crop and prototype: it goes to 0 in both
    kinds, and never does in a run that learns, at any batch. The entropy of the targets is no sign of its
    own: with few crops and many prototypes Sinkhorn's lie near log K in a healthy run too. It only names the
    kind. A run warns when the mean over 10 steps lies below 0.005 nats, after the warm-up of the rate, or
    before that if it was 20 times as high: a network that starts with a small LayerScale tells nothing apart
    yet, which is no collapse.

    Args:
        start: the step from which the run continues; what it had seen is read from `metrics.jsonl`.
        warm: the step from which a run should tell crops apart.
        most: log K, the entropy in nats of crops that get all prototypes alike.
    """

    def __init__(self, folder: Path, start: int, *, warm: int, most: float) -> None:
        self.path, self.warm, self.most = folder / "warnings.jsonl", warm, most
        self.lines: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self.highest, self.warned = 0.0, ""
        if is_main():
            cut_lines(self.path, start)
            for line in read_metrics(folder):
                if line["step"] <= start:
                    self._judge(line["step"], line)

    def see(self, step: int, line: dict[str, Any]) -> None:
        """Take in a step's figures; warn if the judgement is a new one."""
        before = self.warned
        self._judge(step, line)
        if not self.warned or self.warned == before:
            return
        entropy = self._mean("entropy.student")
        text = KINDS[self.warned].format(entropy=entropy, most=self.most)
        log.warning("step %d: a collapse in the making, %s: %s", step, self.warned, text)
        if is_main():
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, "kind": self.warned, "text": text}) + "\n")

    def _judge(self, step: int, line: dict[str, Any]) -> None:
        if line.get("told_apart.student") is None or line.get("entropy.student") is None:
            return
        self.lines.append(line)
        if len(self.lines) < KEPT:
            return
        apart = self._mean("told_apart.student")
        self.highest = max(self.highest, apart)
        if apart > 2 * ALIKE:
            self.warned = ""
        elif apart < ALIKE and (step > self.warm or apart < FELL * self.highest):
            self.warned = "uniform" if self._mean("entropy.student") > self.most / 2 else "one prototype"

    def _mean(self, key: str) -> float:
        return sum(line[key] for line in self.lines) / len(self.lines)


@torch.no_grad()
def spread(features: Float[Tensor, "batch dim"]) -> dict[str, float]:
    """Of the teacher's CLS tokens of the first views of all ranks; all ranks call it.

    Returns:
        `features.rank`: the effective rank, exp of the entropy of the normalised singular values (RankMe,
            arXiv 2210.02885, eq. 1); at most the pictures in the batch, so compare it at equal batches.
        `features.nearest`: mean distance of L2-normalised features to their nearest neighbour, 0 to 2.
    """
    with torch.autocast(features.device.type, enabled=False):
        rows = all_gather(features.float())
        shares = torch.linalg.svdvals(rows) + 1e-7
        shares = shares / shares.sum()
        unit = normalize(rows, dim=1)
        similarity = (unit @ unit.T).fill_diagonal_(-1.0).amax(dim=1) if len(unit) > 1 else unit.new_ones(1)
        return {
            "features.rank": float(torch.special.entr(shares).sum().exp()),
            "features.nearest": float((2 - 2 * similarity).clamp(min=0).sqrt().mean()),
        }
