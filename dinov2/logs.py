"""What a run writes about itself: a line a step in `metrics.jsonl`, TensorBoard events, and its versions."""

import hashlib
import json
import math
import os
import platform
import subprocess
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Self

from dinov2.exits import UserError
from dinov2.files import write_bytes, write_json
from dinov2.parallel import is_main


class Metrics:
    """`metrics.jsonl` and TensorBoard of one run folder, cut at the step from which the run continues.

    Only the main process writes; on the others it does nothing.

    Args:
        wandb: project at Weights & Biases to log to as well, which keeps what it was sent: after a return to
            an earlier step it shows the first lines of that step. Empty for none.

    Raises:
        UserError: `wandb` is given and its package is not installed.
    """

    def __init__(self, folder: Path, start: int, *, tensorboard: bool = True, wandb: str = "") -> None:
        self._file = self._board = self._online = None
        if is_main():
            self._online = _online(folder, wandb) if wandb else None
            path = folder / "metrics.jsonl"
            cut_lines(path, start)
            self._file = open(path, "a")  # noqa: SIM115  # closed when the run ends, by __exit__
            self._board = _board(folder, start) if tensorboard else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        if self._online is not None:
            self._online.finish()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line for the state after `step` steps; keys such as `knn.teacher` are dotted."""
        if self._file is None or not values:
            return
        line = {"step": step} | {key: _short(value) for key, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._online is not None:
            self._online.log({key.replace(".", "/"): value for key, value in values.items()}, step=step)
        if self._board is not None:
            for key, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(key.replace(".", "/"), value, step)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`."""
    return read_lines(folder / "metrics.jsonl")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of such a file, none if it is not there; one that a kill left unfinished is not read."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines if line]


def write_versions(path: Path, **facts: Any) -> None:
    """`versions.json`: the code (git hash and difference), the packages, the machine, and the given facts."""
    code = _git("rev-parse", "HEAD")
    write_json(
        path,
        facts
        | {
            "git": code,
            "git_diff": _git("diff", "HEAD") if code else None,
            "python": platform.python_version(),
            "machine": {"processor": _processor(), "cores": os.cpu_count(), "system": platform.platform()},
            "packages": dict(
                sorted({found.metadata["Name"]: found.version for found in distributions()}.items())
            ),
        },
    )


def cut_lines(path: Path, start: int) -> None:
    """Keep the lines up to step `start`, none for a run that begins anew, and of those only whole ones."""
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")[:-1] if start else []
    kept = [line for line in lines if line and json.loads(line)["step"] <= start]
    write_bytes(path, b"".join(line + b"\n" for line in kept))


def _board(folder: Path, start: int) -> Any:
    from torch.utils.tensorboard.writer import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else 0)


def _online(folder: Path, project: str) -> Any:
    """The run at Weights & Biases, the same one whenever this folder continues."""
    try:
        wandb = import_module("wandb")
    except ImportError:
        raise UserError(f"wandb={project} needs a package: pip install wandb, or leave wandb= out") from None
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return wandb.init(project=project, name=folder.name, id=name, resume="allow", dir=folder)


def _short(value: Any) -> Any:
    """Seven digits; null for what is not finite, for which JSON has no word."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _git(*words: str) -> str | None:
    """What git says of the checkout this code runs from, or None where it is installed without one."""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine()
    )
