"""A small run of `dinov2 train`, as the tests start it."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SMALL = """steps: 8
batch: 8
model: {size: vit_tiny, depth: 2, patch: 8, registers: 1, drop_path: 0.3}
heads:
  separate: true
  dino: {hidden: 32, bottleneck: 16, prototypes: 64}
  ibot: {hidden: 32, bottleneck: 16, prototypes: 32}
augment: {global_size: 32, local_size: 16, local_crops: 2}
checkpoint: {every: 2}
tensorboard: false
threads: 1
knn: {size: 32, resize: 32, k: 3, every: 4}
"""
SPEEDS = ("pictures_per_second", "seconds_left", "tokens_per_second", "utilisation", "waiting", "memory_gib")


def train_words(pictures: Path, *words: str, module: str = "dinov2.train") -> list[str]:
    """`dinov2 train` on the fixture's pictures with the small recipe; the output is `run`."""
    recipe = str(pictures / "small.yaml")
    return [sys.executable, "-m", module, recipe, f"data={pictures / 'train'}", "output=run", *words]


def finish(
    words: Sequence[str], folder: Path, env: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run to the end in `folder`."""
    return subprocess.run(
        words, cwd=folder, capture_output=True, text=True, timeout=240, env=os.environ | dict(env or {})
    )


def lines_of(path: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` without what differs from run to run."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in SPEEDS} for line in lines]


def on_processes(
    words: Sequence[str], folder: Path, count: int, env: Mapping[str, str] | None = None
) -> "list[subprocess.Popen[str]]":
    """The command as ranks of one run, as a launcher that does nothing else would start them."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ranks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            words,
            cwd=folder,
            env=os.environ | ranks | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | dict(env or {}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def wait_for_lines(path: Path, count: int, runs: "Sequence[subprocess.Popen[str]]") -> None:
    """Return when the file has so many lines; fail if a run ends before."""
    until = time.monotonic() + 200
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert all(run.poll() is None for run in runs) and time.monotonic() < until
        time.sleep(0.05)
