"""The launcher's settings: everything under `slurm.`; all other words belong to the launched program."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from dinov2.config import listed, one_of, read, section
from dinov2.exits import UserError

PREFIX = "slurm."
VARIABLE = "DINOV2_SLURM_"  # DINOV2_SLURM_PARTITION=gpu in the environment stands for slurm.partition=gpu
EXECUTORS = {"slurm", "local", "debug"}


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """What a job asks of the cluster. Empty or 0: as the cluster has it by default."""

    executor: str = "slurm"  # slurm; local: this machine, in the background; debug: here, waiting for the end
    nodes: int = 1  # machines
    gpus_per_node: int = 0  # GPUs of each; a process is started for every one
    tasks_per_node: int = 0  # processes on each node; 0: one for each GPU, or one
    cpus: int = 0  # cores of each process
    mem: str = ""  # memory of each node, such as 64G
    time: str = ""  # limit: minutes, or [days-]hours:minutes:seconds
    partition: str = ""  # where to queue
    account: str = ""  # whom it is charged to
    qos: str = ""  # quality of service
    constraint: str = ""  # features that nodes must have
    exclude: str = ""  # nodes not to use
    array: int = 1  # jobs that share the work: {index} and {count} in words stand for each one's part
    array_parallel: int = 256  # how many of an array run at once
    signal_seconds: int = 120  # how long before the time limit the program is told to save
    setup: list[str] = listed()  # shell lines before the program: module load …, export …
    python: str = ""  # command that starts Python on a node (in a container); empty: this interpreter
    srun: list[str] = listed()  # further words for srun, such as --container-image=…
    extra: list[str] = listed()  # further options for sbatch, such as --mail-type=END
    retries: int = 3  # restarts in a row without progress, after which a job gives up
    check: bool = False  # try every node and link before the program, and leave slow ones out
    check_limit: float = 0.5  # share of the median rate below which a node is slow

    @property
    def tasks(self) -> int:
        """Processes on each node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def minutes(self) -> int:
        """The time limit in minutes, rounded up; 0 for none."""
        return parse_time(self.time)


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Where a program runs."""

    slurm: SlurmConfig = section(SlurmConfig)


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The launcher's words and the program's."""
    ours = [word for word in words if word.startswith(PREFIX)]
    return ours, [word for word in words if word not in ours]


def read_slurm(words: Sequence[str], environ: Mapping[str, str] = os.environ) -> SlurmConfig:
    """Site file (`slurm.site=`, a name from configs/slurm or a path) < environment < words.

    Raises:
        UserError: a misspelt setting, a wrong type, an unknown site.
    """
    site = environ.get(VARIABLE + "SITE", "")
    rest = []
    for word in words:
        if word.startswith("slurm.site="):
            site = word.partition("=")[2]
        else:
            rest.append(word)
    names = [field.name for field in fields(SlurmConfig)]
    from_environ = [
        f"{PREFIX}{name}={environ[VARIABLE + name.upper()]}"
        for name in names
        if VARIABLE + name.upper() in environ
    ]
    config = read(LaunchConfig, [*([site] if site else []), *from_environ, *rest], recipes="slurm").slurm
    one_of(config.executor, EXECUTORS, "slurm.executor")
    for name in ("nodes", "array", "signal_seconds"):
        if getattr(config, name) < 1:
            raise UserError(f"slurm.{name}={getattr(config, name)}: it must be at least 1")
    parse_time(config.time)
    return config


def parse_time(text: str) -> int:
    """Minutes of sbatch's notations: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S; 0 for an empty text."""
    if not text:
        return 0
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", text):
        raise UserError(f"slurm.time={text}: give minutes, or [days-]hours:minutes:seconds")
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) + (seconds > 0)
