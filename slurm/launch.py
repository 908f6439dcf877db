"""One job, or one array of jobs, handed to SLURM, to this machine, or run here, through submitit."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor

from dinov2.exits import UserError
from dinov2.files import lock
from slurm.config import SlurmConfig
from slurm.program import Program
from slurm.queue import ACTIVE, call, last_line, queued
from slurm.record import jobs_folder, note_submission, submissions

FOREVER = 10 * 365 * 24 * 60  # minutes: submitit must have a limit, the partition has its own


@dataclass(frozen=True, kw_only=True)
class Job:
    """A stage to run: `dinov2 STAGE WORDS`, whose results go to `output`."""

    stage: str
    words: list[str]
    output: Path
    name: str = ""
    jobs: Path | None = None  # where what is kept of the job goes; None: output/.jobs

    @property
    def folder(self) -> Path:
        return (self.jobs or jobs_folder(self.output)).absolute()

    def commands(self, count: int) -> list[list[str]]:
        """What each of `count` jobs runs, after the interpreter."""
        filled = [
            [word.replace("{index}", str(index)).replace("{count}", str(count)) for word in self.words]
            for index in range(count)
        ]
        program = ["-m", "slurm.follow"] if self.stage == "follow" else ["-m", "dinov2", self.stage]
        return [[*program, *words] for words in filled]


class _Offline(SlurmExecutor):
    """Writes scripts where there is no SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def script(job: Job, config: SlurmConfig, after: Sequence[str] = ()) -> str:
    """The batch script, without asking anything of a cluster."""
    executor = _Offline(job.folder, python=config.python or None)
    executor.update_parameters(**_parameters(job, config, after))
    if config.array > 1:
        executor.parameters["map_count"] = config.array
    return executor._make_submission_file_text(executor._submitit_command_str, "dry")


def launch(job: Job, config: SlurmConfig, after: Sequence[str] = ()) -> str:
    """Submit, and return the job's id; nothing is left behind where that fails.

    Args:
        after: ids of jobs that must be done first.

    Raises:
        UserError: the folder is in use, there is no such cluster, or SLURM refuses, with its reason.
    """
    folder = job.folder
    refuse_in_use(job, waits=bool(after))
    new = _missing(folder)
    check = ["-m", "slurm.check", str(folder), f"{config.check_limit:g}"] if config.check else []
    programs = [
        Program(words, folder, job.output.absolute(), first=check, retries=config.retries)
        for words in job.commands(config.array)
    ]
    try:
        executor = _executor(job, config, folder, after)
        if config.executor == "slurm":  # some clusters queue for ever what they can never run
            call(["sbatch", "--test-only"], text=script(job, config))
        folder.mkdir(parents=True, exist_ok=True)
        with redirect_stderr(StringIO()):  # submitit repeats there what sbatch says
            jobs = _submit(programs, executor)
    except (FailedJobError, FailedSubmissionError) as error:
        _remove(folder, new)
        raise UserError(f"sbatch: {last_line(str(error))}") from None
    except (UserError, OSError):
        _remove(folder, new)
        raise
    ids = [one.job_id for one in jobs]
    name = ids[0].partition("_")[0] if config.executor == "slurm" else ids[0]
    facts = {"stage": job.stage, "words": job.words, "executor": config.executor, "jobs": ids}
    facts |= {"output": str(job.output)}
    note_submission(folder, name, **facts)
    if config.executor == "debug":
        for one in jobs:
            one.result()
    return name


def check_words(job: Job, count: int) -> None:
    """Let the stage itself look at its settings now, not after hours in the queue.

    Raises:
        UserError: what the stage says is wrong.
    """
    command = [sys.executable, *job.commands(count)[0], "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(last_line(done.stderr).removeprefix(f"dinov2 {job.stage}: "))


def refuse_in_use(job: Job, *, waits: bool) -> None:
    """A `UserError` if a job that is queued or runs, or a process on this machine, has the folder.

    One that waits for others may find theirs in it: stages of a pipeline can share a folder.
    """
    output = job.output
    for line in submissions(job.folder)[-1:]:
        if line["executor"] == "slurm":
            for name, there in queued([line["job"]]).items():
                if there.state in ACTIVE:
                    raise UserError(
                        f"output={output} is in use by job {name} ({there.state.lower()}); "
                        f"`dinov2 jobs {output}` shows it, `scancel {name}` ends it"
                    )
    if not waits and (output / ".lock").exists():
        try:
            with lock(output / ".lock", blocking=False):
                pass
        except BlockingIOError as error:
            raise UserError(f"output={output} is in use by {error or 'another process'}") from None


def _submit(programs: list[Program], executor: submitit.Executor) -> list[submitit.Job[Any]]:
    delayed = [DelayedSubmission(program) for program in programs]
    if len(delayed) == 1 or isinstance(executor, SlurmExecutor):
        return executor._internal_process_submissions(delayed)
    return [job for one in delayed for job in executor._internal_process_submissions([one])]


def _executor(job: Job, config: SlurmConfig, folder: Path, after: Sequence[str]) -> submitit.Executor:
    if config.executor == "debug":
        return submitit.DebugExecutor(folder)
    if config.executor == "local":
        if config.nodes > 1:
            raise UserError(f"slurm.executor=local has one node, not slurm.nodes={config.nodes}")
        local = submitit.LocalExecutor(folder, python=config.python or None)
        local.update_parameters(
            timeout_min=config.minutes or FOREVER,
            gpus_per_node=config.gpus_per_node,
            tasks_per_node=config.tasks,
            signal_delay_s=config.signal_seconds,
            setup=config.setup,
        )
        return local
    try:
        executor = SlurmExecutor(folder, python=config.python or None)
    except RuntimeError:
        raise UserError(
            "srun and sbatch were not found: run this where SLURM is, or give slurm.executor=local"
        ) from None
    executor.update_parameters(**_parameters(job, config, after))
    return executor


def _parameters(job: Job, config: SlurmConfig, after: Sequence[str]) -> dict[str, Any]:
    """submitit's names for what the settings ask."""
    folder = job.folder
    python = config.python or shlex.quote(sys.executable)
    ending = f"{python} -m slurm.ending {shlex.join([str(folder), str(job.output.absolute())])}"
    additional: dict[str, Any] = {"requeue": True}
    for option in config.extra:
        key, _, value = option.removeprefix("--").partition("=")
        additional[key] = value or True
    if after:
        additional["kill-on-invalid-dep"] = "yes"
    asked = {
        "nodes": config.nodes,
        "ntasks_per_node": config.tasks,
        "gpus_per_node": config.gpus_per_node or None,
        "cpus_per_task": config.cpus or None,
        "mem": config.mem or None,
        "partition": config.partition or None,
        "account": config.account or None,
        "qos": config.qos or None,
        "constraint": config.constraint or None,
        "exclude": config.exclude or None,
        "dependency": "afterok:" + ":".join(after) if after else None,
        "signal_delay_s": config.signal_seconds,
        "array_parallelism": config.array_parallel,
        "job_name": job.name or f"{job.stage}-{job.output.name}",
        "srun_args": ["--kill-on-bad-exit=1", *config.srun],
        # The script must outlive the signals that end the program, so that it can have the job queued again.
        "setup": ["trap : TERM USR2 CONT", *config.setup],
        "teardown": ["status=$?", f"{ending} $status {config.retries}", "exit $?"],
        "additional_parameters": additional,
    }
    # These two have values of submitit's own where none is given.
    return {"time": config.minutes or None, "wckey": None} | {
        key: value for key, value in asked.items() if value is not None
    }


def _missing(folder: Path) -> Path | None:
    """The highest folder on the way to this one that is not there yet."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    return missing[-1] if missing else None


def _remove(folder: Path, new: Path | None) -> None:
    if new is not None:
        shutil.rmtree(new, ignore_errors=True)
        return
    for path in [*folder.glob("*.pkl"), *folder.glob(".submission_file_*")]:
        path.unlink()
