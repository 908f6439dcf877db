"""Questions to SLURM's own commands, with answers as plain values and errors as one line."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from dinov2.exits import UserError

FIELDS = "%i|%T|%r|%M|%l|%D|%N|%Q"
ACTIVE = {
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "REQUEUED",
    "REQUEUE_HOLD",
    "RESIZING",
}
GONE = ("Invalid job id specified",)  # what squeue says of jobs that it has forgotten


@dataclass(frozen=True)
class Queued:
    """A job as squeue has it."""

    job: str
    state: str  # PENDING, RUNNING, COMPLETED, …
    reason: str
    elapsed: str
    limit: str
    nodes: int
    where: str
    priority: int


def call(words: Sequence[str], *, text: str | None = None, seconds: float = 60.0) -> str:
    """What a command prints, given `text` to read.

    Raises:
        UserError: it is not installed, or it failed, with its own last line.
    """
    try:
        done = subprocess.run(
            list(words), input=text, capture_output=True, text=True, timeout=seconds, check=False
        )
    except FileNotFoundError:
        raise UserError(
            f"{words[0]} was not found: run this where SLURM is, or give slurm.executor=local"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{words[0]} did not answer within {seconds:g} s") from None
    if done.returncode:
        raise UserError(f"{words[0]}: {last_line(done.stderr or done.stdout)}")
    return done.stdout


def queued(jobs: Sequence[str]) -> dict[str, Queued]:
    """The jobs that SLURM still knows; of an array's tasks each by itself (7_0, 7_1, …)."""
    found: dict[str, Queued] = {}
    for job in jobs:
        try:
            text = call(
                ["squeue", "--noheader", "--array", "--states=all", f"--format={FIELDS}", f"--jobs={job}"]
            )
        except UserError as error:
            if not any(gone in str(error) for gone in GONE):
                raise
            continue
        for line in text.splitlines():
            name, state, reason, elapsed, limit, nodes, where, priority = line.split("|")
            found[name] = Queued(name, state, reason, elapsed, limit, int(nodes), where, int(priority))
    return found


def place_in_queue(job: Queued) -> tuple[int, int]:
    """The job's place among all pending ones by priority, and how many these are."""
    lines = call(["squeue", "--noheader", "--array", "--states=PENDING", "--format=%i|%Q"]).splitlines()
    priorities = dict(line.split("|") for line in lines)
    ahead = sum(int(value) > job.priority for name, value in priorities.items() if name != job.job)
    return ahead + 1, len(priorities)


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
