"""Checkpoints that are written while training goes on: whole or not there, of the moment of the call."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinov2.checkpoint import Checkpoints
from dinov2.exits import UserError
from dinov2.parallel import rank
from tests.ranks import on_ranks

KILLED_WHILE_WRITING = """
import os, sys, time
from pathlib import Path
import torch
from dinov2.checkpoint import Checkpoints
with Checkpoints(Path(sys.argv[1])) as checkpoints:
    checkpoints.save(1, {"weight": torch.full((1000,), 1.0)})
    checkpoints.wait()
    checkpoints.save(2, {"weight": torch.full((2**26,), 2.0)})  # 256 MiB
    part = Path(sys.argv[1]) / ".part-00000002"
    while not any(part.glob("*.distcp")):
        time.sleep(0.0005)
    os._exit(9)
"""


def _save_and_change(folder: str) -> list[int]:
    with Checkpoints(Path(folder), keep=2, keep_every=4) as checkpoints:
        for step in range(1, 8):
            state = {"mine": {f"weight{rank()}": torch.full((1000,), 1.0 * step)}, "step": step}
            checkpoints.save(step, state)
            state["mine"][f"weight{rank()}"].fill_(-1.0)
    return checkpoints.steps()


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_written_is_the_state_of_the_call_and_old_ones_go(ranks: int, tmp_path: Path):
    folder = str(tmp_path / "checkpoints")
    steps = [_save_and_change(folder)] if ranks == 1 else on_ranks(ranks, _save_and_change, folder)
    assert steps[0] == [4, 6, 7]
    for step in steps[0]:
        state = {"mine": {f"weight{one}": torch.zeros(1000) for one in range(ranks)}, "step": 0}
        loaded = Checkpoints(tmp_path / "checkpoints").load(step, state)
        assert loaded["step"] == step
        assert all(bool((loaded["mine"][f"weight{one}"] == step).all()) for one in range(ranks))
    assert not list((tmp_path / "checkpoints").glob(".part*"))


def test_a_kill_while_writing_leaves_the_one_before(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(folder)], timeout=200)
    assert killed.returncode == 9
    assert list(folder.glob(".part-00000002/*")), "it was not killed while writing"
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.steps() == [1]
        assert checkpoints.load(1, {"weight": torch.zeros(1000)})["weight"].sum() == 1000.0
        assert not list(folder.glob(".part*"))


def test_a_write_that_fails_is_an_error_of_the_next_call_and_shows_nothing(tmp_path: Path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))  # as a disk that is full
    try:
        with pytest.raises(OSError), Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(2, {"weight": torch.zeros(2**22)})
            checkpoints.save(4, {"weight": torch.zeros(4)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoints.steps() == []


def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path: Path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"weight": torch.zeros(3)})
    with pytest.raises(UserError, match="cannot be loaded"):
        checkpoints.load(1, {"weight": torch.zeros(5)})
    damaged = next((tmp_path / "00000001").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:20])
    with pytest.raises(UserError, match="cannot be loaded"):
        checkpoints.load(1, {"weight": torch.zeros(3)})
