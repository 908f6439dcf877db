"""What is kept of each job beside its logs, in OUTPUT/.jobs: its starts, what came of it, and why."""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dinov2.exits import NoProgress, RunAgain, UserError
from dinov2.files import read_json, write_json

FOLDER = ".jobs"  # hidden, so that an output folder with nothing else in it still counts as new
SUBMITTED = "submitted.jsonl"
NOT_RESULTS = ("config.yaml", "versions.json", "metrics.jsonl", "tensorboard", "report.html")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One job. `stuck`: restarts in a row without a new file; `ended`: done or failed, or empty."""

    starts: int = 0
    stuck: int = 0
    marker: str = ""
    status: int | None = None
    ended: str = ""
    reason: str = ""
    excluded: list[str] = field(default_factory=list)


def jobs_folder(output: Path | str) -> Path:
    return Path(output) / FOLDER


def read_record(folder: Path, job: str) -> Record:
    path = folder / f"{job}.json"
    return Record(**read_json(path)) if path.exists() else Record()


def write_record(folder: Path, job: str, record: Record) -> None:
    write_json(folder / f"{job}.json", asdict(record))


def marker(output: Path) -> str:
    """A hash that changes when the program finishes a piece: of the names of its files, logs apart."""
    names = (
        str(path.relative_to(output))
        for path in _files(output)
        if path.relative_to(output).parts[0] not in NOT_RESULTS
    )
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]


def started(record: Record, now: str) -> Record:
    """The record after a start, `now` being the marker: what was there before is nobody's progress."""
    return replace(record, starts=record.starts + 1, marker=record.marker or now)


def after(record: Record, status: int, now: str, reason: str, *, retries: int) -> Record:
    """The record after the program left with `status`. It may start again unless `ended` says otherwise.

    0 is the end, and so are 2 and 70, which say that starting again is of no use. Everything else, a save
    (75), a kill, a bug, may start again as long as the last `retries` restarts have not all been in vain.
    """
    if status == 0:
        return replace(record, status=0, ended="done", reason="", stuck=0, marker=now)
    if status in (UserError.status, NoProgress.status):
        return replace(record, status=status, ended="failed", reason=reason, marker=now)
    stuck = 0 if now != record.marker or status == RunAgain.status else record.stuck + 1
    if stuck > retries:
        reason = f"{stuck} starts without progress, the last with status {status}: {reason}"
        return replace(record, status=status, stuck=stuck, ended="failed", reason=reason)
    return replace(record, status=status, stuck=stuck, marker=now, reason=reason)


def note_submission(folder: Path, job: str, **facts: Any) -> None:
    line = {"job": job, "time": time.strftime("%Y-%m-%d %H:%M:%S")} | facts
    with open(folder / SUBMITTED, "a") as file:
        file.write(json.dumps(line) + "\n")


def submissions(folder: Path) -> list[dict[str, Any]]:
    """What was submitted for an output folder, oldest first."""
    path = folder / SUBMITTED
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def logs(folder: Path, job: str) -> list[Path]:
    """The logs of a job's tasks, errors before output, latest first."""
    found = [*folder.glob(f"{job}_*_log.err"), *folder.glob(f"{job}_*_log.out")]
    return sorted(found, key=lambda path: (path.suffix != ".err", -path.stat().st_mtime))


def last_words(folder: Path, job: str, size: int = 8192) -> str:
    """The line in which the program said why it ended, or else the last line of the latest log."""
    last = ""
    for path in logs(folder, job):
        lines = [line for line in _tail(path, size).splitlines() if line.strip() and "submitit" not in line]
        said = [line for line in lines if line.startswith("dinov2 ")]
        if said:
            return said[-1]
        last = last or next(
            (line for line in reversed(lines) if not line.startswith(("srun:", "slurmstepd"))), ""
        )
    return last or "nothing was said"


def tail(folder: Path, job: str, lines: int = 12) -> list[str]:
    """The last lines of the log that ends with an error, for a person to read."""
    for path in logs(folder, job):
        found = [line for line in _tail(path, 16384).splitlines() if line.strip() and "submitit" not in line]
        if found:
            return [f"{path}:", *found[-lines:]]
    return []


def _tail(path: Path, size: int) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - size))
        return file.read().decode(errors="replace").replace("\r", "\n")


def _files(folder: Path) -> Iterable[Path]:
    """All files below a folder but hidden ones, and none that is being written."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _files(path)
        else:
            yield path
