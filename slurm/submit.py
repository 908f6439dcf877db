"""Run a stage, or a pipeline of stages, as jobs on a cluster (SLURM) or in the background on this machine.

usage: dinov2 submit train|curate|eval|embed WORDS … [slurm.KEY=VALUE …] [--dry]
       dinov2 submit pipeline NAME|FILE output=DIR [key=value …] [slurm.KEY=VALUE …] [--dry]

WORDS are those of the stage itself. What begins with slurm. asks for nodes, GPUs, time and the like; a site's
own defaults come from slurm.site=NAME (configs/slurm/NAME.yaml) and from the environment (DINOV2_SLURM_…).
--dry prints the batch scripts and asks nothing of the cluster.

A job that was preempted, ran out of time, lost a node or was killed is queued again by itself and continues.
It gives up after slurm.retries restarts in a row that finished nothing new.
"""

from importlib.metadata import entry_points
from pathlib import Path

from dinov2.config import one_of, usage
from dinov2.console import GROUP, run
from dinov2.exits import UserError
from slurm.config import LaunchConfig, SlurmConfig, read_slurm, split_words
from slurm.launch import Job, check_words, launch, script
from slurm.pipeline import submit_pipeline

DRY = "--dry"
OWN = {"submit", "jobs"}


def main(words: list[str]) -> None:
    """The `dinov2 submit` command."""
    if not words or words[0] in ("-h", "--help"):
        print(usage(LaunchConfig, "slurm", __doc__ or ""))
        return
    stage = words[0]
    dry = DRY in words
    ours, rest = split_words([word for word in words[1:] if word != DRY])
    if stage == "pipeline":
        submit_pipeline(rest, ours, dry=dry)
        return
    stages = {entry.name for entry in entry_points(group=GROUP)} - OWN
    one_of(stage, stages | {"pipeline"}, "submit")
    submit_stage(stage, rest, read_slurm(ours), dry=dry)


def submit_stage(stage: str, words: list[str], config: SlurmConfig, *, dry: bool) -> None:
    """Check a stage's words, submit it, and say how to follow it."""
    job = Job(stage=stage, words=words, output=output_of(words))
    check_words(job, config.array)
    if dry:
        print(script(job, config))
        return
    name = launch(job, config)
    print(f"job {name}; follow it: dinov2 jobs {job.output}")


def output_of(words: list[str]) -> Path:
    """Where the stage puts its results, by its words."""
    found = [word.removeprefix("output=") for word in words if word.startswith("output=")]
    if not found or not found[-1]:
        raise UserError(
            "output= is missing: a job needs a folder of its own on a file system that all nodes see"
        )
    return Path(found[-1])


if __name__ == "__main__":
    run(main, "submit")
