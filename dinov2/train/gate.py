"""The gate before the update: a step whose loss or gradient is not finite changes nothing, and is named."""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dinov2.data.sources import Source
from dinov2.logs import cut_lines
from dinov2.parallel import all_gather_objects, all_max, is_main
from dinov2.ssl.objective import Outcome
from dinov2.train.feed import Fed
from dinov2.train.rollback import Astray
from dinov2.train.state import State

SHOWN = 8  # ids of pictures in a line of the log
log = logging.getLogger(__name__)


def agree(loss: Tensor, norms: Sequence[Tensor], stop: bool) -> tuple[bool, bool]:
    """Whether loss and gradients are finite on every rank, and whether any rank was asked to stop.

    One collective of two numbers, so that all ranks apply or skip a step together, and save the same one.
    """
    finite = torch.isfinite(torch.stack([loss.detach().float(), *(norm.float() for norm in norms)])).all()
    flags = all_max(torch.stack([~finite, torch.tensor(stop, device=loss.device)]).float())
    bad, stopping = flags.tolist()
    return not bad, bool(stopping)


class Gate:
    """Counts the steps that were not applied and writes them to `skipped.jsonl`: step, losses, picture ids.

    The file is cut at the step from which a run continues, as `metrics.jsonl` is.
    """

    def __init__(self, folder: Path, source: Source, start: int, *, limit: int) -> None:
        self.path, self.source, self.limit = folder / "skipped.jsonl", source, limit
        if is_main():
            cut_lines(self.path, start)

    def count(self, state: State, finite: bool, stopping: bool, outcome: Outcome, fed: Fed) -> None:
        """Keep count of a step, which all ranks agree to have applied or not. Advances `state.step`.

        Raises:
            Astray: so many steps in a row were not finite that skipping does not help.
        """
        state.step += 1
        if finite:
            state.skipped_in_a_row = 0
            return
        state.skipped += 1
        state.skipped_in_a_row += 1
        what, pictures = self._named(outcome, fed)
        log.warning("step %d not applied: %s (pictures %s …)", state.step, what, ", ".join(pictures[:SHOWN]))
        if is_main():
            line = {"step": state.step, "what": what, "pictures": pictures}
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        if state.skipped_in_a_row >= self.limit:
            raise Astray(f"{self.limit} steps in a row were not finite: {what}", pictures, stopping=stopping)

    def _named(self, outcome: Outcome, fed: Fed) -> tuple[str, list[str]]:
        """What was not finite anywhere, and the ids of the pictures of all ranks."""
        bad = [name for name, loss in outcome.losses.items() if not math.isfinite(float(loss))]
        ids: list[str] = self.source.table["id"].take(fed.batch.rows.tolist()).to_pylist()
        everywhere = all_gather_objects((bad, ids))
        losses = sorted({name for names, _ in everywhere for name in names})
        what = ("loss " + ", ".join(losses) if losses else "gradient") + " not finite"
        return what, [picture for _, pictures in everywhere for picture in pictures]
