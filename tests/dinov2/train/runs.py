"""A small run of `dinov2 train`, as the tests start it."""

import json
import os
import subprocess
import sys
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
SPEEDS = ("pictures_per_second", "waiting", "memory_gib")


def train_words(pictures: Path, *words: str, module: str = "dinov2.train") -> list[str]:
    """`dinov2 train` on the fixture's pictures with the small recipe; the output is `run`."""
    recipe = str(pictures / "small.yaml")
    return [sys.executable, "-m", module, recipe, f"data={pictures / 'train'}", "output=run", *words]


def finish(
    words: Sequence[str], folder: Path, env: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run to the end in `folder`."""
    return subprocess.run(
        words, cwd=folder, capture_output=True, text=True, timeout=120, env=os.environ | dict(env or {})
    )


def lines_of(path: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` without what differs from run to run."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in SPEEDS} for line in lines]
