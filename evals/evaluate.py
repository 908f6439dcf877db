"""One backbone, one task: measured once, whatever is killed or started twice."""

import shutil
import time
from pathlib import Path
from typing import Any

from dinov2.exits import UserError
from dinov2.files import lock
from dinov2.parallel import is_main
from evals.bench import FEATURES, Bench
from evals.config import EvalConfig
from evals.ranks import dismiss, serve
from evals.registry import TASKS
from evals.report import write_report, write_result_page
from evals.results import LINES, RESULTS, as_result, read_result, result_key, result_path, save

WORK = "work"  # what a killed command continues from


def evaluate(name: str, config: EvalConfig) -> tuple[Path, dict[str, Any]]:
    """Measure by the task of this name, unless the result is there: its file and its content.

    Of several ranks all call it. The first carries it out, and all return the same.

    Raises:
        UserError: see the task; or the output folder holds something else.
    """
    found, bench = None, Bench(config)
    try:
        if is_main():
            found = _evaluated(name, config, bench)
    finally:
        if is_main():
            dismiss(found)
        else:
            found = serve(bench)
        bench.store.close()
    if found is None:
        raise SystemExit(0)  # the first rank failed, and says why
    return found


def _evaluated(name: str, config: EvalConfig, bench: Bench) -> tuple[Path, dict[str, Any]]:
    task, folder = TASKS[name], Path(config.output)
    _check_folder(folder)
    data = task.data(config)
    key = result_key(name, bench, config, data.sources)
    path, work = result_path(folder, key), folder / WORK / key
    # One process measures; another with the same command waits, and finds the result.
    with lock(folder / WORK / f".{key}.lock"):
        if not path.exists():
            start = time.perf_counter()
            outcome = task.run(bench, data, config, work)
            bench.seconds["total"] = time.perf_counter() - start
            result = as_result(name, bench, config, data.sources, outcome)
            write_result_page(path.with_suffix(".html"), result, outcome)
            save(folder, key, result)
            shutil.rmtree(work, ignore_errors=True)
    write_report(folder)
    return path, read_result(path)


def _check_folder(folder: Path) -> None:
    """Results of any number of commands may lie together, but with nothing else."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output={folder} is a file; name a folder")
    ours = (FEATURES, RESULTS, LINES, WORK)
    there = (
        [path.name for path in folder.iterdir() if not path.name.startswith(".")] if folder.exists() else []
    )
    if there and not any(name in there for name in ours):
        raise UserError(f"output={folder} holds something else; name an empty or new folder")
