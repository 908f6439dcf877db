"""A graph of jobs from a file in configs/pipelines: what is done is not done again, what failed is named."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dinov2.config import recipe_path
from dinov2.exits import UserError
from slurm.config import PREFIX, SlurmConfig, read_slurm, split_words
from slurm.launch import Job, check_words, launch, script
from slurm.queue import call
from slurm.record import jobs_folder
from slurm.standing import Standing, standing

NAME = re.compile(r"\{([a-z_][a-z0-9_]*)\}")
KEYS = {"stage", "words", "more", "after", "output", "each", "slurm"}
# A job that only submits others is one process, whatever those ask for.
FOLLOWER = [
    f"{PREFIX}{word}" for word in ("nodes=1", "gpus_per_node=0", "tasks_per_node=1", "array=1", "check=false")
]
OF_A_JOB = {"index", "count", "item", "step"}  # filled in for each job of an array, or each folder found


@dataclass(frozen=True, kw_only=True)
class Node:
    """One stage of a pipeline. `after`: the names of the stages that must be done first."""

    name: str
    stage: str
    words: list[str]
    output: Path
    after: list[str]
    each: str = ""  # a glob: the stage runs for each folder that it finds, while `watched` goes on
    watched: str = ""
    slurm: list[str] = field(default_factory=list)

    def before(self) -> set[str]:
        """The stages that must be submitted first."""
        return {*self.after, *([self.watched] if self.watched else [])}


@dataclass(frozen=True)
class Planned:
    """A stage with the job that it is, and what that asks for."""

    node: Node
    job: Job
    config: SlurmConfig


def submit_pipeline(words: list[str], slurm_words: list[str], *, dry: bool) -> None:
    """Submit every stage that is not done, each waiting for those whose output it reads."""
    if not words or "=" in words[0]:
        raise UserError("name a pipeline: dinov2 submit pipeline NAME|FILE output=DIR")
    values = dict(_pair(word) for word in words[1:])
    if not values.get("output"):
        raise UserError("output= is missing: a pipeline needs a folder that all nodes see")
    output = Path(values["output"]).absolute()
    nodes = read_pipeline(recipe_path("pipelines", words[0]), values)
    plan = [plan_stage(node, output, slurm_words) for node in nodes]
    if dry:
        for planned in plan:
            waits = [f"<{name}>" for name in planned.node.after]
            print(f"### {planned.node.name}\n{script(planned.job, planned.config, waits)}")
        return
    jobs = _submit(plan)
    print(f"follow them: dinov2 jobs {values['output']}" if jobs else "everything is done")


def _submit(plan: "list[Planned]") -> dict[str, str]:
    """The jobs of the stages that are not done; all of the new ones, or none."""
    there = {planned.node.name: _standing(planned) for planned in plan}
    for planned in plan:
        if there[planned.node.name].state in ("none", "failed") and not planned.node.each:
            check_words(planned.job, planned.config.array)
    jobs: dict[str, str] = {}
    new: list[str] = []
    try:
        for planned in plan:
            name, found = planned.node.name, there[planned.node.name]
            if found.state == "done" and planned.node.watched not in jobs:
                print(f"{name}: done")
            elif found.state == "active":
                jobs[name] = found.job
                print(f"{name}: job {found.job} is there")
            else:
                waits = [jobs[other] for other in planned.node.after if other in jobs]
                jobs[name] = launch(planned.job, planned.config, waits)
                new += [jobs[name]] if planned.config.executor == "slurm" else []
                before = f" (before: {found.reason})" if found.state == "failed" else ""
                print(f"{name}: job {jobs[name]}{before}")
    except BaseException:
        if new:
            call(["scancel", *new])
        raise
    return jobs


def _standing(planned: "Planned") -> Standing:
    """How the stage's last submission went; a `UserError` if that was with other words."""
    there = standing(planned.job.folder)
    before, now = (split_words(words)[1] for words in (there.words, planned.job.words))
    if there.state != "none" and before != now:
        differing = ", ".join(sorted(set(before) ^ set(now)))
        raise UserError(
            f"{planned.node.name} was submitted with other words ({differing}); name another output="
        )
    return there


def read_pipeline(path: Path, values: dict[str, str]) -> list[Node]:
    """The stages in an order in which each comes after what it needs.

    In words, {NAME} is the output folder of the stage NAME, which is thereby waited for, or else a value
    given on the command line.

    Raises:
        UserError: not YAML, an unknown key, a name that is neither a stage nor given, a circle.
    """
    try:
        stages = _stages(path)
        nodes = {name: _node(path, name, body, stages, values) for name, body in stages.items()}
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is no pipeline (stages: NAME: stage, words): {error}") from None
    unknown = sorted(set(values) - {"output"} - _used(stages))
    if unknown:
        raise UserError(
            f"{path.stem} does not use {unknown[0]}=; it uses: {', '.join(sorted(_given(stages)))}"
        )
    return list(_in_order(nodes))


def _stages(path: Path) -> dict[str, dict[str, Any]]:
    """What a file says of each stage, those of the pipeline that it begins with first."""
    text = yaml.safe_load(path.read_text())
    first = _stages(recipe_path("pipelines", text["begins_with"])) if "begins_with" in text else {}
    return {**first, **text["stages"]}


def plan_stage(node: Node, output: Path, slurm_words: list[str]) -> Planned:
    """The job of a stage; what the command line says of SLURM wins over what the file says."""
    asked = [*node.slurm, *slurm_words]
    return Planned(node, _job(node, output, asked), read_slurm([*asked, *(FOLLOWER if node.each else [])]))


def _job(node: Node, output: Path, asked: list[str]) -> Job:
    folder = jobs_folder(output) / node.name
    words = [word for word in node.words if not word.startswith("output=")] + [f"output={node.output}"]
    if node.each:
        words[-1] += "/{step}"  # a folder holds one process at a time, and these jobs run side by side
        watched = jobs_folder(output) / node.watched
        words = [node.each, node.stage, *words, f"follow.until={watched}", *asked]
    return Job(
        stage="follow" if node.each else node.stage,
        words=words,
        output=node.output,
        name=f"{output.name}-{node.name}",
        jobs=folder,
    )


def _node(
    path: Path, name: str, body: dict[str, Any], stages: dict[str, Any], values: dict[str, str]
) -> Node:
    wrong = sorted(set(body) - KEYS)
    if wrong:
        raise UserError(f"{path}: {name}: there is no {wrong[0]!r}; there are: {', '.join(sorted(KEYS))}")
    top = Path(values["output"]).absolute()
    folders = {other: top / given.get("output", other) for other, given in stages.items()}

    def fill(text: str) -> str:
        def value(match: "re.Match[str]") -> str:
            key = match.group(1)
            if key in OF_A_JOB:
                return match.group(0)
            if key in folders:
                return str(folders[key])
            if key in values:
                return values[key]
            raise UserError(f"{path.stem} needs {key}=, for its stage {name}")

        return NAME.sub(value, text)

    words = [str(word) for word in [*body["words"], *body.get("more", [])]]
    read = [match for word in [*words, body.get("each", "")] for match in NAME.findall(word)]
    needs = [key for key in read if key in stages and key != name]
    watched = NAME.findall(body.get("each", ""))  # looked at while it is being made, not waited for
    return Node(
        name=name,
        stage=body["stage"],
        words=[fill(word) for word in words],
        output=folders[name],
        after=sorted({*[key for key in needs if key not in watched], *body.get("after", [])}),
        each=fill(body.get("each", "")),
        watched=watched[0] if watched else "",
        slurm=[f"slurm.{key}={fill(str(value))}" for key, value in body.get("slurm", {}).items()],
    )


def _in_order(nodes: dict[str, Node]) -> Iterable[Node]:
    placed: set[str] = set()
    while len(placed) < len(nodes):
        ready = [
            node for node in nodes.values() if node.name not in placed and placed.issuperset(node.before())
        ]
        if not ready:
            raise UserError(f"stages wait for each other: {', '.join(sorted(set(nodes) - placed))}")
        yield from ready
        placed |= {node.name for node in ready}


def _used(stages: dict[str, Any]) -> set[str]:
    return {
        key
        for body in stages.values()
        for word in [
            *body["words"],
            *body.get("more", []),
            body.get("each", ""),
            *body.get("slurm", {}).values(),
        ]
        for key in NAME.findall(str(word))
    }


def _given(stages: dict[str, Any]) -> set[str]:
    return _used(stages) - set(stages) - OF_A_JOB


def _pair(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals:
        raise UserError(f"{word!r} is not understood: values are written key=value")
    return key, value
