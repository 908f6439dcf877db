"""Evaluate a backbone: its accuracy by nearest neighbours, linear heads and other protocols.

usage: dinov2 eval BACKBONE TASK [RECIPE] data=ROOT output=DIR [key=value …]
       dinov2 eval BACKBONE TASK [RECIPE] train=SOURCE test=SOURCE output=DIR [key=value …]
       dinov2 eval BACKBONE suite=small|full|FILE SET=PATH … output=DIR [key=value …]   (--help: the sets)

BACKBONE is a backbone folder, timm:NAME, or a weights file with ?architecture=…; untrained:ANY OF THESE for
the same with fresh weights; or pixels, for no backbone at all. The output folder gathers the results of any
number of backbones and tasks: results/, results.jsonl, report.html. A killed command continues when it is run
again. Under torchrun features are computed on all ranks; the result is that of one process.
"""

import sys

from dinov2.config import one_of, read
from dinov2.console import run
from dinov2.exits import UserError
from dinov2.parallel import is_main, pick_device, process_group
from evals import suite
from evals.evaluate import evaluate
from evals.ranks import MINUTES
from evals.registry import TASKS
from evals.report import REPORT
from evals.results import described


def main(words: list[str]) -> None:
    """Run the command: two words, and settings."""
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        sys.exit(0)
    if any(word.startswith(suite.WORD) for word in words[1:]):
        suite.main(words)
        return
    if len(words) < 2 or any("=" in word.partition("?")[0] for word in words[:2]):
        raise UserError("name a backbone and a task: dinov2 eval BACKBONE TASK data=… output=…")
    backbone, name, *rest = words
    task = TASKS[one_of(name, TASKS, "task")]
    # A recipe is the first of the words that are left; the backbone is a setting like the others.
    config = read(task.config, [*rest, f"backbone={backbone}"], recipes="evals", doc=_overview())
    with process_group(pick_device(config.device), minutes=MINUTES):
        path, result = evaluate(name, config)
        if is_main():
            print(f"{name} of {backbone}: {described(result)}")
            print(f"{path}; all results: {config.output}/{REPORT}")


def _overview() -> str:
    tasks = [f"  {name:<12} {task.summary}" for name, task in sorted(TASKS.items())]
    return "\n".join(
        [(__doc__ or "").strip(), "", "tasks (their settings: dinov2 eval BACKBONE TASK --help):", *tasks]
    )


if __name__ == "__main__":
    run(main, "eval")
