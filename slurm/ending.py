"""The last lines of a batch script: note how the program ended, and start it again where that is of use.

Outside of the tasks, because a task may be what was killed. Called as `python -m slurm.ending FOLDER OUTPUT
STATUS RETRIES` with SLURM's variables; its exit status is the job's.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

from dinov2.exits import NoProgress, Stop
from dinov2.files import read_json
from slurm.queue import call
from slurm.record import Record, after, last_words, marker, read_record, write_record


def end(folder: Path, output: Path, status: int, *, retries: int) -> int:
    """Write the record, and either requeue this job or return the status that it ends with."""
    job = this_job()
    record = after(read_record(folder, job), status, marker(output), last_words(folder, job), retries=retries)
    slow = folder / f"{job}.slow.json"
    if slow.exists() and not record.ended:
        record = replace(record, excluded=sorted({*record.excluded, *read_json(slow)["nodes"]}))
        slow.unlink()
        write_record(folder, job, record)
        _requeue_without(job, record)
        return 0
    write_record(folder, job, record)
    if not record.ended:
        call(["scontrol", "requeue", job])
        return status
    if record.ended == "failed":
        print(f"dinov2 submit: {record.reason}", file=sys.stderr)
    return status if status in (0, 2) else NoProgress.status


def this_job() -> str:
    """The id of the job whose batch script this is; ARRAY_INDEX for one of an array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def _requeue_without(job: str, record: Record) -> None:
    """Requeue, leaving out nodes. Only a pending job's nodes can be changed, and requeuing ends this script,
    so a job of a moment does that."""
    nodes = ",".join(record.excluded)
    same = {"partition": "SLURM_JOB_PARTITION", "account": "SLURM_JOB_ACCOUNT", "qos": "SLURM_JOB_QOS"}
    options = [f"--{name}={os.environ[key]}" for name, key in same.items() if os.environ.get(key)]
    then = f"scontrol update jobid={job} ExcNodeList={nodes} && scontrol release {job}"
    wait = f"until scontrol show job {job} | grep -q JobState=PENDING; do sleep 1; done"
    call(
        [
            *("sbatch", "--ntasks=1", "--time=10", "--output=/dev/null", *options),
            *(f"--job-name=without-{nodes}", f"--exclude={nodes}", f"--wrap={wait}; {then}"),
        ]
    )
    call(["scontrol", "requeuehold", job])


if __name__ == "__main__":
    try:
        folder, output, status, retries = sys.argv[1:]
        sys.exit(end(Path(folder), Path(output), int(status), retries=int(retries)))
    except Stop as stop:
        print(f"dinov2 submit: {stop}", file=sys.stderr)
        sys.exit(stop.status)
