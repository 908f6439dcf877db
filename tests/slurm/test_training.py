"""A training on two nodes, interrupted in every way a cluster has, ends with the same weights."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pictures import class_folder
from tests.slurm.conftest import Cluster

RECIPE = """batch: 16
model: {size: vit_tiny, depth: 2, patch: 8, registers: 1, drop_path: 0.3}
heads:
  dino: {hidden: 32, bottleneck: 16, prototypes: 64}
augment: {global_size: 48, local_size: 16, local_crops: 2}
checkpoint: {every: 5}
tensorboard: false
threads: 1
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    class_folder(root / "train", classes=3, each=16)
    (root / "small.yaml").write_text(RECIPE)
    return root


def words(pictures: Path, output: Path, steps: int, *more: str) -> list[str]:
    recipe = str(pictures / "small.yaml")
    return ["train", recipe, f"data={pictures / 'train'}", f"steps={steps}", f"output={output}", *more]


def preempt(cluster: Cluster, job: str) -> None:
    """A job that takes both nodes for a moment."""
    cluster.run(
        "sbatch",
        "--partition=urgent",
        "--nodes=2",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=srun sleep 1",
    )


def requeue(cluster: Cluster, job: str) -> None:
    cluster.run("scontrol", "requeue", job)


def lose_a_rank(cluster: Cluster, job: str) -> None:
    """SIGKILL for the program of the last rank."""
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            seen = environ.read_bytes().split(b"\0")
            command = (environ.parent / "cmdline").read_bytes()
        except OSError:
            continue
        ours = f"SLURM_JOB_ID={job}".encode() in seen and b"dinov2\0train" in command
        last = any(entry.startswith(b"RANK=") and entry != b"RANK=0" for entry in seen)
        if ours and last:
            os.kill(int(environ.parent.name), signal.SIGKILL)
            return
    raise AssertionError(f"no process of job {job} to kill")


def lose_a_node(cluster: Cluster, job: str) -> None:
    cluster.run("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    until = time.monotonic() + 60  # its slurmd is well, and has it back in service when it next reports
    while "down" in cluster.run("sinfo", "--noheader", "--nodes=node2", "--partition=main", "--format=%T"):
        assert time.monotonic() < until
        time.sleep(0.5)


def interrupted(
    cluster: Cluster, output: Path, job: str, events: list[Callable[[Cluster, str], None]]
) -> None:
    """Each event in turn, as soon as the training has made some new steps since the last."""
    for event in events:
        reached = saved(output)
        until = time.monotonic() + 120
        while saved(output) <= reached:
            assert time.monotonic() < until, cluster.jobs(output) + cluster.queue()
            time.sleep(0.1)
        event(cluster, job)


def saved(output: Path) -> int:
    """The step of the last whole checkpoint."""
    return max((int(path.name) for path in (output / "checkpoints").glob("[0-9]*")), default=0)


def job_of(said: str) -> str:
    return said.split("job ")[1].split(";")[0]


def weights(output: Path) -> bytes:
    return (output / "backbone" / "model.safetensors").read_bytes()


def test_preempted_requeued_and_losing_a_rank(cluster: Cluster, pictures: Path, tmp_path: Path) -> None:
    shape = ["slurm.nodes=2", "slurm.time=10"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    job = job_of(cluster.submit(*words(pictures, broken, 60, *shape)))
    refused = cluster.submit(*words(pictures, broken, 60, *shape), status=2)
    assert f"is in use by job {job}" in refused and refused.count("\n") == 1
    interrupted(cluster, broken, job, [preempt, requeue, lose_a_rank])
    seen = cluster.wait(broken, ": done")
    assert "restarts" in seen
    cluster.submit(*words(pictures, whole, 60, *shape))
    cluster.wait(whole, ": done")
    assert weights(broken) == weights(whole)


@pytest.mark.slurm
def test_everything_that_happens_to_four_ranks(cluster: Cluster, pictures: Path, tmp_path: Path) -> None:
    shape = ["slurm.nodes=2", "slurm.tasks_per_node=2"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    short = ["slurm.time=1", "slurm.signal_seconds=30"]  # a limit that has to be met more than once
    job = job_of(cluster.submit(*words(pictures, broken, 400, *shape, *short)))
    interrupted(cluster, broken, job, [preempt, requeue, lose_a_rank, lose_a_node])
    seen = cluster.wait(broken, ": done", seconds=600)
    assert int(seen.split(" restarts")[0].split()[-1]) >= 5  # the four above, and the limit
    cluster.submit(*words(pictures, whole, 400, *shape))
    cluster.wait(whole, ": done", seconds=300)
    assert weights(broken) == weights(whole)


def test_a_bug_does_not_loop(cluster: Cluster, pictures: Path, tmp_path: Path) -> None:
    """What always leaves with status 1 starts again as often as allowed, and then says why it ended."""
    setup = f"slurm.python={pictures / 'python'}"
    end = f'*slurm.ending*) exec {sys.executable} "$@";;'
    script = f'#!/bin/sh\ncase "$*" in {end} *) echo "no such luck" >&2; exit 1;; esac\n'
    (pictures / "python").write_text(script)
    (pictures / "python").chmod(0o755)
    cluster.submit(*words(pictures, tmp_path / "out", 5, setup, "slurm.retries=1"))
    seen = cluster.wait(tmp_path / "out", ": failed")
    assert "2 starts without progress, the last with status 1: no such luck" in seen


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("slurm.partition=nowhere", "refused the job"),
        ("slurm.nodes=50", "refused the job"),
        ("slurm.time=soon", "slurm.time=soon: give minutes"),
        ("slurm.node=2", "did you mean 'slurm.nodes'"),
        ("batsh=8", "did you mean 'batch'"),
    ],
)
def test_bad_words_leave_nothing_behind(
    cluster: Cluster, pictures: Path, tmp_path: Path, word: str, complaint: str
) -> None:
    said = cluster.submit(*words(pictures, tmp_path / "out", 5, word), status=2)
    assert complaint in said and said.count("\n") == 1, said
    assert not (tmp_path / "out").exists()
    assert "out" not in cluster.queue()
