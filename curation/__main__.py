"""Choose from a pool the pictures to train on; write shards, a manifest and a reason for every decision.

Stages, in this order: ingest, filters, embed, calibrate, duplicates, holdout, clusters, retrieval,
budget, write, report. Each leaves its files under output/stages/NAME and may be killed at any moment: the
same command continues. stop_after=NAME ends early. from_stage=NAME decides again in a finished folder:
settings of that stage and of later ones may be new, and what was searched for is not searched again.
from_stage=ingest takes up pictures that came to the sources or went; what was there is not read again.
remove=LIST output=DIR takes pictures out of a finished folder.

On many machines: shard=i/n does a part of the first stage that is not finished, shard=merge then goes on.
"""

import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from curation import (
    budget,
    calibrate,
    clusters,
    duplicates,
    embed,
    filters,
    holdout,
    ingest,
    report,
    retrieval,
    takedown,
    write,
)
from curation.config import CurateConfig, stage_of
from curation.pieces import Workers
from curation.run import Run
from curation.shares import PartDone, Share
from dinov2.config import read
from dinov2.console import run as run_command
from dinov2.files import lock, remove_leftovers
from dinov2.folders import claim

STAGES: dict[str, Callable[[Run], dict[str, Any]]] = {
    "ingest": ingest.run,
    "filters": filters.run,
    "embed": embed.run,
    "calibrate": calibrate.run,
    "duplicates": duplicates.run,
    "holdout": holdout.run,
    "clusters": clusters.run,
    "retrieval": retrieval.run,
    "budget": budget.run,
    "write": write.run,
    "report": report.run,
}
SHARED = ("ingest", "filters", "embed", "duplicates", "holdout")  # stages with pieces to be shared out


def main(words: list[str]) -> None:
    """`dinov2 curate [RECIPE] pool=… [seeds=…] [holdout=…] output=DIR`."""
    if any(word.startswith("remove=") for word in words):
        return takedown.main(words)
    # Before torch is imported: its threads that wait otherwise spin, on cores that other processes could use.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    config = read(CurateConfig, words, recipes="curation", doc=__doc__ or "")
    config.check()
    again = _from(config.from_stage)
    share = Share.parse(config.shard)
    folder = claim(
        config.output, config, free=lambda key: stage_of(key) in again, hint=_begin_at, shared=share.partial
    )
    with folder as path, Workers(config.workers) as workers:
        curate(Run(config, path, workers, share))


def curate(run: Run) -> None:
    """Run the stages that are not done yet, in order, up to `stop_after`."""
    names = list(STAGES)
    if run.config.stop_after is not None:
        names = names[: names.index(run.config.stop_after) + 1]
    if not run.share.partial:
        remove_leftovers(run.folder, deep=True)
    _check(run)
    with _one_at_a_time(run):
        run.check_sources()
    again = _from(run.config.from_stage)
    left = [name for name in names if name in again or run.done(name) is None]
    run.share.later = bool(left) and left[0] != names[0]
    for name in left:
        if run.share.partial and name not in SHARED:
            return _say(f"{name} is done by one process, with shard=merge")
        start = time.perf_counter()
        with _one_at_a_time(run):
            run.begin(name)
        try:
            counts = STAGES[name](run)
            run.share.leave(name)
        except PartDone as part:
            return _say(str(part))
        run.finish(name, counts)
        _say(f"{name}: {_listed(counts)} ({time.perf_counter() - start:.1f} s)")
    if not left:
        _say(f"{run.folder} is finished up to {names[-1]}; nothing to do")
    if run.done("holdout") is not None:
        run.forget_before()
    if names[-1] == "report":
        _say(f"report: {run.folder / 'report.html'}")


def _check(run: Run) -> None:
    """What would only fail after hours of reading fails now."""
    if run.done("filters") is None:
        filters.check(run.config)
    if run.done("embed") is None:
        embed.check(run.config)
        if (line := calibrate.borrowed(run.config)) is not None:
            _say(line)


def _one_at_a_time(run: Run) -> AbstractContextManager[None]:
    """Of several shards one makes room; a process alone holds the folder anyway."""
    return lock(run.folder / ".begin.lock") if run.share.partial else nullcontext()


def _from(stage: str | None) -> list[str]:
    """This stage and the later ones; none for None."""
    return [] if stage is None else list(STAGES)[list(STAGES).index(stage) :]


def _begin_at(differing: list[str]) -> str:
    """What to add so that settings with these keys may differ."""
    first = min(map(stage_of, differing), key=list(STAGES).index)
    return f", or add from_stage={first}, which decides again from there on"


def _listed(counts: dict[str, Any]) -> str:
    known = {key.replace("_", " "): value for key, value in counts.items() if value is not None}
    return ", ".join(f"{key} {value:,}" for key, value in known.items()) or "done"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main, "curate")
