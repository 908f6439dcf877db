"""A training on two nodes, interrupted in every way a cluster has, ends with the same weights."""

import json
import os
import signal
import subprocess
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
STEPS = 280  # more than four ranks take in a minute


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
    """A job that takes all nodes for a moment."""
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


@pytest.mark.slurm
def test_preempted_requeued_and_losing_a_rank(cluster: Cluster, pictures: Path, tmp_path: Path) -> None:
    shape = ["slurm.nodes=2", "slurm.exclude=node3", "slurm.time=10"]
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
@pytest.mark.timeout(1200)
def test_everything_that_happens_to_four_ranks(cluster: Cluster, pictures: Path, tmp_path: Path) -> None:
    shape = ["slurm.nodes=2", "slurm.exclude=node3", "slurm.tasks_per_node=2"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    short = ["slurm.time=1", "slurm.signal_seconds=5"]  # a limit that has to be met at least once
    job = job_of(cluster.submit(*words(pictures, broken, STEPS, *shape, *short)))
    interrupted(cluster, broken, job, [preempt, requeue, lose_a_rank, lose_a_node])
    seen = cluster.wait(broken, ": done", seconds=600)
    assert int(seen.split(" restarts")[0].split()[-1]) >= 5  # the four above, and the limit
    cluster.submit(*words(pictures, whole, STEPS, *shape))
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
        ("slurm.partition=nowhere", "Invalid partition name"),
        ("slurm.nodes=50", "Requested node configuration is not available"),
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


def test_a_full_disk_gets_one_line_and_no_job(cluster: Cluster, pictures: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        (small / "full").write_bytes(bytes(64 * 1024))
        before = cluster.queue()
        said = cluster.submit(*words(pictures, small / "out", 5), status=2)
        assert "No space left" in said and said.count("\n") == 1, said
        assert cluster.queue() == before
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.slurm
def test_a_slow_node_is_left_out(cluster: Cluster, pictures: Path, tmp_path: Path) -> None:
    """On node2, eight busy neighbours share the core of each rank; the other nodes have a core without."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs a second core, to be slow on")
    busy = f"for i in $(seq 8); do timeout 60 taskset -c 1 {sys.executable} -S -c 'while True: pass' & done"
    wrapper = tmp_path / "python"
    wrapper.write_text(
        "#!/bin/sh\n"
        f'[ "$SLURMD_NODENAME" = node2 ] && {{ {busy}; exec taskset -c 1 {sys.executable} "$@"; }}\n'
        f'exec taskset -c 0 {sys.executable} "$@"\n'
    )
    wrapper.chmod(0o755)
    check = ["slurm.check=true", f"slurm.python={wrapper}", "slurm.nodes=2"]
    cluster.submit(*words(pictures, tmp_path / "out", 3, *check))
    seen = cluster.wait(tmp_path / "out", ": done", seconds=200)
    assert "left out as slow: node2" in seen
    (report,) = (tmp_path / "out" / ".jobs").glob("*.check.json")
    rates = json.loads(report.read_text())["rates"]
    assert set(rates) == {"node1", "node3"}  # the last start's
    assert all(rate > 0 for own in rates.values() for rate in own.values())
