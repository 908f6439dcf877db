"""Submit a job for each folder that appears, such as an evaluation of every backbone that a training exports.

usage: python -m slurm.follow GLOB STAGE WORDS … output=DIR follow.until=JOBS [slurm.KEY=VALUE …]

A stage of a pipeline with `each:` is this program, a small job of its own that runs beside the training,
which knows nothing of it. In WORDS, {item} is the folder and {step} its name. It ends when the job that makes
the folders has ended (JOBS is where that is noted) and each folder has its job; run again, it goes on.
"""

import time
from glob import glob
from pathlib import Path

from dinov2.console import run
from dinov2.exits import UserError
from slurm.config import SlurmConfig, read_slurm, split_words
from slurm.launch import Job, launch
from slurm.standing import standing

UNTIL = "follow.until="
EVERY = 5.0  # seconds between looks


def main(words: list[str]) -> None:
    """Submit until there is nothing more to come."""
    if len(words) < 3:
        raise UserError("usage: python -m slurm.follow GLOB STAGE WORDS … output=DIR follow.until=JOBS")
    pattern, stage, *rest = words
    ours, rest = split_words(rest)
    until = next((word.removeprefix(UNTIL) for word in rest if word.startswith(UNTIL)), "")
    rest = [word for word in rest if not word.startswith(UNTIL)]
    config = read_slurm(ours)
    seen: set[str] = set()
    while True:
        over = not until or standing(Path(until)).state != "active"  # asked before looking: nothing is missed
        for item in sorted(glob(pattern)):
            if item not in seen:
                seen.add(item)
                _submit(item, stage, rest, config)
        if over:
            return
        time.sleep(EVERY)


def _submit(item: str, stage: str, words: list[str], config: SlurmConfig) -> None:
    """A job for this folder, unless one is there or has done its work."""
    step = Path(item).name
    filled = [word.replace("{item}", item).replace("{step}", step) for word in words]
    output = Path(next(word for word in filled if word.startswith("output=")).removeprefix("output="))
    job = Job(stage=stage, words=filled, output=output, name=f"{stage}-{step}")
    there = standing(job.folder)
    if there.state in ("none", "failed"):
        print(f"{item}: job {launch(job, config)}", flush=True)


if __name__ == "__main__":
    run(main, "follow")
