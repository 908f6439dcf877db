"""Ranks started on one machine end together, and pass on how."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dinov2.processes import ranks_here, run_all
from tests.pictures import class_folder

ASKED = "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75));"


def program(body: str) -> list[str]:
    return [sys.executable, "-S", "-c", ASKED + body]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("pass", 0),
        ("sys.exit(70 if os.environ['RANK'] == '1' else time.sleep(60))", 70),
        ("os.kill(os.getpid(), signal.SIGKILL) if os.environ['RANK'] == '0' else time.sleep(60)", 137),
    ],
)
def test_when_one_rank_fails_the_others_end_and_its_status_is_passed_on(body: str, status: int) -> None:
    began = time.monotonic()
    assert run_all(program(body), ranks_here(3)) == status
    assert time.monotonic() - began < 50  # the others would sleep for 60


def test_a_signal_reaches_every_rank(tmp_path: Path) -> None:
    body = f"open(r'{tmp_path}/' + os.environ['RANK'], 'w'); time.sleep(60)"
    inner = f"import sys; from dinov2.processes import *; sys.exit(run_all({program(body)!r}, ranks_here(2)))"
    parent = subprocess.Popen([sys.executable, "-c", inner])
    while len(list(tmp_path.iterdir())) < 2:
        assert parent.poll() is None
        time.sleep(0.02)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(20) == 75


def test_training_starts_its_own_ranks(tmp_path: Path) -> None:
    class_folder(tmp_path / "pictures", classes=2, each=4)
    words = [f"data={tmp_path / 'pictures'}", "batch=4", "steps=2", "nproc=2", "workers=0", "threads=1"]
    size = ["model.size=vit_tiny", "model.depth=1", "model.patch=8", "heads.dino.prototypes=32"]
    crops = ["augment.global_size=32", "augment.local_size=16", "augment.local_crops=2", "tensorboard=false"]
    command = [sys.executable, "-m", "dinov2.train", *words, *size, *crops, f"output={tmp_path / 'run'}"]
    environ = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("backbone: ") == 1  # only the first rank speaks
    shards = {path.name.split("_")[2] for path in (tmp_path / "run" / "checkpoints" / "00000002").glob("__*")}
    assert shards == {"0", "1"}
