"""Whether what was submitted is done, failed, or still there."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slurm.queue import ACTIVE, queued
from slurm.record import read_record, submissions


@dataclass(frozen=True)
class Standing:
    """A stage's last submission: none, done, failed or active, its job, its words, and why it failed."""

    state: str
    job: str = ""
    words: list[str] = field(default_factory=list)
    reason: str = ""


def standing(folder: Path) -> Standing:
    """How the last submission in this folder went, by its records and by what SLURM still knows."""
    lines = submissions(folder)
    if not lines:
        return Standing("none")
    line = lines[-1]
    records = [read_record(folder, name) for name in line["jobs"]]
    if all(record.ended == "done" for record in records):
        return Standing("done", line["job"], line["words"])
    if _active(line):
        return Standing("active", line["job"], line["words"])
    reasons = [record.reason for record in records if record.ended == "failed"]
    return Standing(
        "failed", line["job"], line["words"], reasons[0] if reasons else "neither queued nor ended"
    )


def _active(line: dict[str, Any]) -> bool:
    if line["executor"] == "slurm":
        return any(job.state in ACTIVE for job in queued([line["job"]]).values())
    return line["executor"] == "local" and any(process_lives(job) for job in line["jobs"])


def process_lives(job: str) -> bool:
    """Whether a local job, named after the process that looks after its tasks, still runs."""
    try:
        os.kill(int(job), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True
