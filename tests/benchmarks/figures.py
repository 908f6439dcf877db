"""Figures of benchmarks as a page, and what they are compared with.

    python -m tests.benchmarks.STAGE [NAME …] [scale=0.1] [data=FOLDER] [page=docs/benchmarks/STAGE.md]

Each benchmark runs in a process of its own, so that its peak memory is its own. Its rows are kept beside the
page (as .json) with machine, date, versions and scale; the page is made from them. All is compared with what
the same process measures next to it, since other programs may share the machine.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
Rows = list[tuple[str, str]]
Benchmark = Callable[[float, Path], Rows]  # of the scale and the folder of real pictures


def peak_memory() -> float:
    """Of this process so far, in GiB. (What getrusage says begins with what the parent held.)"""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**20


def product_rate(dimension: int, dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations a second of a large product on all threads, the best of several."""
    a, b = (torch.randn(4096, dimension).to(dtype) for _ in range(2))
    out = torch.empty(4096, 4096, dtype=dtype)
    best = 0.0
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(3):
            torch.mm(a, b.T, out=out)
        best = max(best, 3 * 2 * 4096**2 * dimension / (time.perf_counter() - start))
    return best


def run(
    module: str,
    words: list[str],
    benchmarks: dict[str, Benchmark],
    *,
    page: Path,
    title: str,
    command: str,
    packages: Sequence[str] = ("torch", "faiss-cpu", "numpy", "scikit-learn"),
) -> None:
    """Run those that `words` name, or all, each as `python -m module NAME`; see this module's docstring."""
    told = dict(word.split("=", 1) for word in words if "=" in word)
    names = [word for word in words if "=" not in word] or list(benchmarks)
    page = Path(told.get("page", page))
    store = page.with_suffix(".json")
    data = Path(told.get("data", os.environ.get("DINOV2_TEST_DATA", ROOT.parent / "shared" / "data")))
    if "inside" in told:  # the process of one benchmark
        rows = benchmarks[names[0]](float(told["scale"]), data)
        peak = ("peak memory of the process", f"{peak_memory():.2f} GiB")
        Path(told["inside"]).write_text(json.dumps([*rows, peak]))
        return
    results: dict[str, Any] = json.loads(store.read_text()) if store.exists() else {}
    for name in names:
        with tempfile.NamedTemporaryFile() as file:
            said = [f"inside={file.name}", f"scale={told.get('scale', 1)}", f"data={data}"]
            subprocess.run(
                [sys.executable, "-m", module, name, *said],
                cwd=ROOT,
                check=True,
            )
            rows = json.loads(Path(file.name).read_text())
        results[name] = {"rows": rows, "scale": float(told.get("scale", 1)), "where": _where(packages)}
        print(*(f"{name}: {what}: {figure}" for what, figure in rows), sep="\n", flush=True)
        page.parent.mkdir(parents=True, exist_ok=True)
        store.write_text(json.dumps(results, indent=1) + "\n")
        page.write_text(_page(results, list(benchmarks), title, command))


def _where(packages: Sequence[str]) -> str:
    about = (
        line.partition(": ")[2]
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    )
    versions = [f"{name} {version(name)}" for name in packages]
    machine = f"{len(os.sched_getaffinity(0))} cores of {next(about, platform.machine())}"
    return ", ".join([time.strftime("%Y-%m-%d"), machine, f"Python {platform.python_version()}", *versions])


def _page(results: dict[str, Any], names: list[str], title: str, command: str) -> str:
    lines = [
        f"# {title}",
        "",
        f"Made by `make {command}`. What a figure is compared with was measured by the same process.",
    ]
    for where in dict.fromkeys(each["where"] for each in results.values()):
        lines += ["", where + ".", "", "| benchmark | scale | what | measured |", "|---|---|---|---|"]
        for name in [name for name in names if name in results and results[name]["where"] == where]:
            lines += [
                f"| {name} | {results[name]['scale']:g} | {what} | {figure} |"
                for what, figure in results[name]["rows"]
            ]
    return "\n".join(lines) + "\n"
