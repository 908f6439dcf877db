"""When skipping steps does not help: back to the last good checkpoint and past the bad batches, or a report.

The rule. A run that went astray continues from the last checkpoint before the first of the bad steps (from
the start if there is none). All batches from there to the last bad one are cut out of the order of data,
since what led astray may lie before the first bad step: the step after the checkpoint takes the batch that
comes after them. Their pictures come again in the next epoch. If the run goes astray again before it has
saved a new good checkpoint, it goes one checkpoint further back, as long as there is one.

`rollbacks.json` holds the cuts. With it the batch of a step remains a function of the step, so that a run
that was rolled back and then killed continues as one that was not killed.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dinov2.checkpoint import Checkpoints
from dinov2.exits import NoProgress, RunAgain
from dinov2.files import read_json, write_json, write_text
from dinov2.logs import read_metrics
from dinov2.parallel import all_gather_objects, barrier, is_main
from dinov2.train.state import State

CAUSES = """\
Usual causes, the most frequent first:
- `optim.lr` too high for the batch, or `optim.warmup` too short: try a half, and watch `norm.*` before the
  first bad step. A run that dies within its warm-up nearly always does for this reason.
- `precision=fp16` or bf16 in something that needs float32: does the same step pass with `precision=fp32`?
- Pictures that are not pictures (constant, float with NaN): look at the ids above; each is in the manifest.
- Only "gradient" not finite, and the losses finite: KoLeo with many equal pictures, or `optim.clip=0`.
- Nothing of this, and other steps each time: a device whose memory is at fault. Try another machine.
"""
log = logging.getLogger(__name__)


class Astray(Exception):
    """Training cannot go on from this state. The message says what is wrong with it."""

    def __init__(self, what: str, pictures: Sequence[str] = (), *, stopping: bool = False) -> None:
        super().__init__(what)
        self.pictures, self.stopping = list(pictures), stopping


@dataclass(frozen=True)
class Cut:
    """One return to a checkpoint."""

    at: int  # the step at which the run went astray
    to: int  # the step of the checkpoint
    first: int  # batches cut out of the order: from this one …
    last: int  # … to this one, excluded
    in_a_row: int  # how many times in a row, this one counted, the run went back without a new checkpoint
    what: str
    pictures: list[str]  # of the last bad step


class Rollbacks:
    """The roll-backs of one run folder.

    Args:
        start: the step from which the run continues; cuts that lie after it are forgotten.
    """

    def __init__(self, folder: Path, start: int) -> None:
        self.path, self.failure = folder / "rollbacks.json", folder / "failure.md"
        self.cuts = [Cut(**cut) for cut in read_json(self.path)] if self.path.exists() else []
        self._keep_up_to(start)
        if is_main():
            self.failure.unlink(missing_ok=True)

    def batch(self, step: int) -> int:
        """The batch that a step takes: its own number and as many as were cut out before."""
        return step + sum(cut.last - cut.first for cut in self.cuts if cut.to <= step)

    def go_back(self, state: State, astray: Astray, checkpoints: Checkpoints, *, limit: int) -> None:
        """Drop the checkpoints after the last good one, and cut the batches out. All ranks call it.

        Raises:
            NoProgress: it went back `limit` times in a row, which did not help; `failure.md` says more.
            RunAgain: a signal had asked to stop.
        """
        last = self.cuts[-1] if self.cuts else None
        there = all_gather_objects(checkpoints.steps())[0]  # the main rank's: it has shown the last one
        good = [step for step in there if step <= state.step - state.skipped_in_a_row]
        stuck = last is not None and (good[-1] if good else 0) <= last.to
        if last is not None and stuck:
            good = [step for step in good if step < last.to] or good[:1]
        cut = Cut(
            at=state.step,
            to=good[-1] if good else 0,
            first=self.batch(good[-1] if good else 0),
            last=self.batch(state.step),
            in_a_row=last.in_a_row + 1 if last and stuck else 1,
            what=str(astray),
            pictures=astray.pictures,
        )
        if cut.in_a_row > limit:
            self._give_up(cut, limit)
        if is_main():
            checkpoints.drop_after(cut.to)
        self._keep_up_to(cut.to)
        self.cuts.append(cut)
        if is_main():
            write_json(self.path, [asdict(one) for one in self.cuts])
        barrier()
        log.warning(
            "step %d: %s. Back to step %d; batches %d to %d are cut out",
            cut.at,
            cut.what,
            cut.to,
            cut.first,
            cut.last - 1,
        )
        if astray.stopping:
            raise RunAgain(f"asked to stop; back at step {cut.to}; the same command continues")

    def _keep_up_to(self, step: int) -> None:
        self.cuts = [cut for cut in self.cuts if cut.to <= step]

    def _give_up(self, cut: Cut, limit: int) -> None:
        if is_main():
            write_text(self.failure, _failure(self.path.parent, [*self.cuts, cut]))
        raise NoProgress(
            f"{cut.what}, last at step {cut.at}, and going back {limit} times did not help; "
            f"{self.failure} says what is known and what usually causes it"
        )


def _failure(folder: Path, cuts: Sequence[Cut]) -> str:
    """What happened, where, with which pictures, the last metrics, and what usually causes it."""
    last = cuts[-1]
    lines = [
        "# This run gave up",
        "",
        f"At step {last.at}: {last.what}.",
        "",
        "## Where it went back before that",
        "",
        *[f"- at step {cut.at} ({cut.what}) to step {cut.to}" for cut in cuts[:-1]],
        "",
        "## Pictures of the last bad step",
        "",
        *([" ".join(last.pictures)] if last.pictures else ["not known: the weights themselves are damaged"]),
        "",
        "`skipped.jsonl` has those of the other bad steps since the last checkpoint.",
        "",
        "## The last metrics",
        "",
    ]
    shown = ("step", "loss", "norm.backbone", "norm.dino_head", "lr", "entropy.teacher", "skipped")
    lines += ["| " + " | ".join(shown) + " |", "|---" * len(shown) + "|"]
    for line in read_metrics(folder)[-20:]:
        values = ("–" if line.get(key) is None else f"{line[key]:.5g}" for key in shown)
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join([*lines, "", "## Why", "", CAUSES])
