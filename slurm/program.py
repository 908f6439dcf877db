"""What runs in each task of a job: the program, as one of as many ranks as the job has tasks.

The program is a child process: its exit status passes on as it is, and a signal to save reaches it whether
the cluster sent it to one process or to all. Nothing here is asked of rank 0 alone: a sharded save needs
every rank, so they agree inside the program at a step of their choosing.
"""

import os
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from submitit import JobEnvironment
from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE

from dinov2.exits import NoProgress, Stop
from dinov2.files import write_text
from dinov2.processes import run_all
from slurm.record import after, last_words, marker, read_record, started, write_record

MEET = 300.0  # seconds until every rank must know where rank 0 is


@dataclass
class Program:
    """A command for every task of a job, called by submitit on the node.

    Args:
        words: of the program, after the Python interpreter: -m dinov2 train …
        folder: the job's own, on a file system that all nodes see.
        output: where the program's results go; new files there are progress.
        first: a command that all tasks run before it, such as the check of nodes; its failure ends the job.
        retries: restarts without progress after which a job on this machine gives up; on a cluster the end
            of the batch script decides.
    """

    words: list[str]
    folder: Path
    output: Path
    first: list[str] = field(default_factory=list)
    retries: int = 0

    def __call__(self) -> None:
        env = JobEnvironment()
        if env.global_rank == 0:
            record = started(read_record(self.folder, env.job_id), marker(self.output))
            write_record(self.folder, env.job_id, record)
        try:
            status = self._run_all(env)
        except Stop as stop:
            print(f"dinov2 submit: {stop}", file=sys.stderr)
            status = stop.status
        if env.cluster != "slurm" and env.global_rank == 0:
            status = self._end(env, status)
        if status:
            sys.exit(status)

    def _run_all(self, env: JobEnvironment) -> int:
        for part, words in (("check", self.first), ("run", self.words)):
            if words:
                status = run_all([sys.executable, *words], [ranks(env, self.folder, part)])
                if status:
                    return status
        return 0

    def _end(self, env: JobEnvironment, status: int) -> int:
        """The status to leave with on this machine, where nobody else has the job start again."""
        record = after(
            read_record(self.folder, env.job_id),
            status,
            marker(self.output),
            last_words(self.folder, env.job_id),
            retries=self.retries,
        )
        write_record(self.folder, env.job_id, record)
        return status if record.ended or env.cluster != "local" else LOCAL_REQUEUE_RETURN_CODE


def ranks(env: JobEnvironment, folder: Path, part: str) -> dict[str, str]:
    """torch's variables for this task; none for a job of one."""
    if env.num_tasks == 1:
        return {}
    host, port = meet(env, folder, part)
    return {
        "RANK": str(env.global_rank),
        "WORLD_SIZE": str(env.num_tasks),
        "LOCAL_RANK": str(env.local_rank),
        "LOCAL_WORLD_SIZE": str(env.num_tasks // env.num_nodes),
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
    }


def meet(env: JobEnvironment, folder: Path, part: str, limit: float = MEET) -> tuple[str, str]:
    """Host and port of rank 0: a free port, because several jobs share a node; a new one at each start.

    Raises:
        NoProgress: rank 0 has not said so in time.
    """
    start = os.environ.get("SLURM_RESTART_COUNT", "0")
    place = folder / "meet" / f"{env.job_id}-{start}-{part}"
    if env.global_rank == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            write_text(place, f"{env.hostnames[0]} {free.getsockname()[1]}")
    until = time.monotonic() + limit
    while not place.exists():
        if time.monotonic() > until:
            raise NoProgress(f"rank 0 did not start within {limit:g} s (no {place})")
        time.sleep(0.1)
    host, port = place.read_text().split()
    return host, port
