"""How the jobs of an output folder are: state, restarts, place in the queue, progress, and why one failed.

usage: dinov2 jobs OUTPUT [follow=true]

OUTPUT is what the stage or the pipeline was given as output=. With follow=true it is looked at again every
few seconds until nothing is queued or runs.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov2.config import read, runtime
from dinov2.console import run
from dinov2.exits import UserError
from slurm.queue import ACTIVE, Queued, place_in_queue, queued
from slurm.record import Record, jobs_folder, read_record, submissions, tail
from slurm.standing import process_lives

EVERY = 5.0  # seconds between looks


@dataclass(frozen=True, kw_only=True)
class JobsConfig:
    """What to look at."""

    follow: bool = runtime(False)  # look again until nothing is queued or runs


def main(words: list[str]) -> None:
    """The `dinov2 jobs` command."""
    folders = [word for word in words if "=" not in word and not word.startswith("-")]
    config = read(JobsConfig, [word for word in words if word not in folders], doc=__doc__ or "")
    if len(folders) != 1:
        raise UserError("name one output folder: dinov2 jobs OUTPUT")
    top = Path(folders[0])
    if not job_folders(top):
        raise UserError(f"no job was submitted for {folders[0]}")
    while True:
        views = [view for folder in job_folders(top) for view in look(folder)]
        print("\n".join(line for view in views for line in view.lines()), flush=True)
        if not config.follow or not any(view.active for view in views):
            return
        time.sleep(EVERY)
        print()


def job_folders(output: Path) -> list[Path]:
    """Where the jobs of an output folder are kept: one for a stage, one for each stage of a pipeline."""
    top = jobs_folder(output)
    found = [path for path in (top, *top.glob("*")) if path.is_dir() and submissions(path)]
    return sorted(found, key=lambda path: (submissions(path)[0]["time"], submissions(path)[0]["job"]))


@dataclass(frozen=True, kw_only=True)
class View:
    """One job, as a person wants to see it."""

    folder: Path
    output: str
    job: str
    stage: str
    state: str
    record: Record
    there: Queued | None
    progress: str

    @property
    def active(self) -> bool:
        return self.state.upper() in ACTIVE

    def lines(self) -> Iterator[str]:
        restarts = f", {self.record.starts - 1} restarts" if self.record.starts > 1 else ""
        yield f"{self.output}: {self.stage}, job {self.job}: {self.state}{restarts}{self._where()}"
        if self.progress:
            yield f"  {self.progress}"
        if self.record.excluded:
            yield f"  left out as slow: {', '.join(self.record.excluded)}"
        if self.record.reason and not self.active:
            yield f"  {self.record.reason}"
        if self.state == "failed":
            yield from (f"  | {line}" for line in tail(self.folder, self.job))

    def _where(self) -> str:
        if self.there is None or not self.active:
            return ""
        if self.there.state == "PENDING":
            place, many = place_in_queue(self.there)
            return f" ({self.there.reason}; {place} of {many} in the queue)"
        return f" for {self.there.elapsed} of {self.there.limit} on {self.there.where}"


def look(folder: Path) -> list[View]:
    """The last submission of a stage: one job, or every task of an array."""
    line = submissions(folder)[-1]
    there = _queued(line)
    progress = progress_of(Path(line["output"]))
    return [_view(folder, name, line, there.get(name), progress) for name in line["jobs"]]


def state_of(record: Record, there: Queued | None) -> str:
    """done or failed where the end was noted; else what SLURM says; else lost."""
    if there is not None and there.state in ACTIVE:
        return there.state.lower()
    if record.ended:
        return record.ended
    return there.state.lower() if there is not None else "lost: neither queued nor ended; submit it again"


def progress_of(output: Path) -> str:
    """The last step of a training, its speed, and the time to its end."""
    lines = _last_metrics(output / "metrics.jsonl")
    if not lines:
        return ""
    last = lines[-1]
    said = [f"step {last['step']:,}"]
    if "loss" in last:
        said.append(f"loss {last['loss']:.3f}")
    if "pictures_per_second" in last:
        said.append(f"{last['pictures_per_second']:,.0f} pictures/s")
    if "seconds_left" in last:
        said.append(f"{last['seconds_left'] / 60:,.0f} min left")
    return ", ".join(said)


def _view(folder: Path, name: str, line: dict[str, Any], there: Queued | None, progress: str) -> View:
    record = read_record(folder, name)
    state = _local_state(name, record) if line["executor"] != "slurm" else state_of(record, there)
    return View(
        folder=folder,
        output=line["output"],
        job=name,
        stage=line["stage"],
        state=state,
        record=record,
        there=there,
        progress=progress,
    )


def _queued(line: dict[str, Any]) -> dict[str, Queued]:
    return queued([line["job"]]) if line["executor"] == "slurm" else {}


def _local_state(name: str, record: Record) -> str:
    """A local job's id is the process that looks after its tasks."""
    if record.ended:
        return record.ended
    return "running" if process_lives(name) else "lost: it does not run and has not ended; submit it again"


def _last_metrics(path: Path, size: int = 65536) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        lines = file.read().split(b"\n")
    whole = lines[1:-1] if path.stat().st_size > size else lines[:-1]
    return [json.loads(line) for line in whole if line]


if __name__ == "__main__":
    run(main, "jobs")
