"""A real SLURM for the tests, started once; where it can neither be found nor installed they say so."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("cluster.sh")
NOT_HERE = 3  # the script's status where SLURM can neither be found nor installed


@dataclass(frozen=True)
class Cluster:
    """The running cluster: `env` for programs that are to find it."""

    env: dict[str, str]

    def run(self, *words: str, status: int = 0) -> str:
        """A command with this status; its output and errors together."""
        done = subprocess.run(
            words,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == status, f"{words} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def submit(self, *words: str, status: int = 0) -> str:
        return self.run(sys.executable, "-m", "slurm.submit", *words, status=status)

    def jobs(self, output: Path) -> str:
        return self.run(sys.executable, "-m", "slurm.jobs", str(output))

    def queue(self) -> str:
        return self.run("squeue", "--noheader", "--format=%i %T %r")

    def wait(self, output: Path, what: str, seconds: float = 120.0) -> str:
        """Wait until `dinov2 jobs` shows this, and return all it shows; fail at once where a job failed."""
        until = time.monotonic() + seconds
        while what not in (seen := self.jobs(output)):
            assert what == "failed" or ": failed" not in seen, seen
            assert time.monotonic() < until, f"waited {seconds:g} s for {what!r}:\n{seen}\n{self.queue()}"
            time.sleep(0.5)
        return seen


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    folder = tempfile.mkdtemp(prefix="slurm-", dir="/tmp")
    started = subprocess.run(
        [str(SCRIPT), "start", folder], capture_output=True, text=True, timeout=300, check=False
    )
    try:
        if started.returncode == NOT_HERE:
            pytest.skip(f"needs SLURM: {started.stderr.strip().splitlines()[-1]}")
        assert started.returncode == 0, started.stderr
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        yield Cluster(
            os.environ | {"SLURM_CONF": started.stdout.strip(), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        )
    finally:
        subprocess.run([str(SCRIPT), "stop", folder], timeout=120, check=False)
