"""Train a backbone on pictures without labels: DINOv2's recipe.

usage: dinov2 train [RECIPE] data=SOURCE output=DIR [key=value …]

The folder gets metrics.jsonl, checkpoints/, backbone/ (the teacher, for `dinov2 eval` and load_backbone) and
report.html. The same command continues a run that was stopped anywhere.
"""

import logging
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from dinov2.allocator import keep_freed_memory
from dinov2.checkpoint import Checkpoints
from dinov2.config import read
from dinov2.console import run
from dinov2.data.sources import Source
from dinov2.files import write_json
from dinov2.folders import claim
from dinov2.logs import write_versions
from dinov2.parallel import barrier, is_main, pick_device, process_group
from dinov2.processes import ranks_here, run_all
from dinov2.train.config import TrainConfig
from dinov2.train.cost import describe
from dinov2.train.exports import export_teacher
from dinov2.train.feed import training_source
from dinov2.train.loop import checkpoints_of, train
from dinov2.train.origin import ORIGIN, begin
from dinov2.train.report import write_report
from dinov2.train.rollback import Astray, Rollbacks
from dinov2.train.state import State, fresh_state, resume


def main(words: list[str]) -> None:
    """The `dinov2 train` command."""
    config = read(TrainConfig, words, recipes="train", doc=__doc__ or "")
    config.check()
    count = config.processes(torch.cuda.device_count())
    if count > 1 and "RANK" not in os.environ:
        sys.exit(run_all([sys.executable, "-m", "dinov2.train", *words], ranks_here(count)))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    if config.keep_memory and device.type == "cpu":
        keep_freed_memory()
    with process_group(device):
        source = training_source(config)
        with claim(config.output, config) if is_main() else nullcontext(Path(config.output)) as folder:
            _run(config, folder, source, device)


def _run(config: TrainConfig, folder: Path, source: Source, device: torch.device) -> None:
    checkpoints = checkpoints_of(config, folder)
    state = _state(config, folder, source, checkpoints, device)
    rollbacks = Rollbacks(folder, state.step)
    barrier()  # the main process holds the folder now; the others would otherwise have begun without it
    if state.step >= config.length(len(source)) and (folder / "report.html").exists():
        if is_main():
            print(f"already done: {state.step} steps, backbone in {folder / 'backbone'}")
        return
    if is_main():
        facts = {"fingerprint": source.fingerprint, "pictures": len(source)}
        write_versions(folder / "versions.json", data=facts, device=describe(device))
    while astray := _train(config, folder, source, state, rollbacks):
        rollbacks.go_back(state, astray, checkpoints, limit=config.max_rollbacks)
        del state  # before it is made anew: there may be no room for two
        state = _state(config, folder, source, checkpoints, device)
    export_teacher(config, folder / "backbone", source, state)
    if is_main():
        write_report(config, folder)
        print(f"backbone: {folder / 'backbone'}\nreport:   {folder / 'report.html'}")


def _state(
    config: TrainConfig, folder: Path, source: Source, checkpoints: Checkpoints, device: torch.device
) -> State:
    """From the last checkpoint; before the first one, from `init=` or the seed."""
    state = fresh_state(config, source.fingerprint, device)
    if config.init and not checkpoints.steps():
        origin = begin(config, state)
        if is_main():
            write_json(folder / ORIGIN, origin)
    return resume(state, checkpoints)


def _train(
    config: TrainConfig, folder: Path, source: Source, state: State, rollbacks: Rollbacks
) -> Astray | None:
    """Train to the end, or give back why that cannot be done (as a value: an exception would keep memory)."""
    try:
        train(config, folder, source, state, rollbacks)
    except Astray as astray:
        return astray.with_traceback(None)
    return None


if __name__ == "__main__":
    run(main, "train")
