"""Many tasks on many data sets by one command: a suite is a YAML file of `sets` and `runs`.

    sets:
      imagenet: folders train/ and val/, each with a folder a class
    runs:
      - {task: knn, data: "{imagenet}"}
      - {task: linear, recipe: linear_cached, data: "{imagenet}", iterations: 1000}

A word `imagenet=PATH` gives a set. A run whose sets are not all given is left out, and named. Other words
are settings: `size=98` of every task that has it, `linear.iterations=500` of one. Each result is a file of
its own, so a killed suite goes on where it was, and a task that fails costs no other one.
"""

import json
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from dinov2.config import CHECK, read, recipe_path
from dinov2.exits import NoProgress, RunAgain, Stop, UserError
from dinov2.parallel import is_main, pick_device, process_group
from evals.config import EvalConfig
from evals.evaluate import evaluate
from evals.ranks import MINUTES
from evals.registry import TASKS
from evals.report import REPORT
from evals.results import described

WORD = "suite="
NEEDED = re.compile(r"\{([\w-]+)\}")
OWN = ("task", "recipe", "name")  # of a run; what else it says are settings


@dataclass(frozen=True)
class Run:
    """One task on one data set."""

    name: str
    task: str
    recipe: str | None
    settings: dict[str, Any]

    @property
    def needs(self) -> list[str]:
        """The sets that its settings name."""
        return sorted({name for value in self.settings.values() for name in NEEDED.findall(str(value))})

    def words(self, given: dict[str, str], chosen: dict[str, str]) -> list[str]:
        """The words of `dinov2 eval`, with sets put in. The user's settings come last, and win."""
        known = {field.name for field in fields(TASKS[self.task].config)}
        words = [self.recipe] if self.recipe else []
        for name, value in self.settings.items():
            text = value if isinstance(value, str) else json.dumps(value)
            words.append(f"{name}={NEEDED.sub(lambda match: given[match[1]], text)}")
        words += [f"{key}={value}" for key, value in chosen.items() if key in known]
        own = f"{self.task}."
        return words + [
            f"{key.removeprefix(own)}={value}" for key, value in chosen.items() if key.startswith(own)
        ]


@dataclass(frozen=True)
class Suite:
    """Attributes:
    sets: what each set is, by the word that gives it.
    """

    sets: dict[str, str]
    runs: list[Run]

    @classmethod
    def read(cls, path: Path) -> "Suite":
        """Raises UserError: the file is no suite, or names a task or set that there is none of."""
        try:
            content = yaml.safe_load(path.read_text())
            sets, listed = dict(content["sets"]), list(content["runs"])
        except (yaml.YAMLError, KeyError, TypeError, ValueError):
            raise UserError(f"{path} is no suite: it needs sets: and runs:") from None
        suite = cls(sets, [_run(one, path) for one in listed])
        for run in suite.runs:
            if unknown := sorted(set(run.needs) - set(sets)):
                raise UserError(f"{path}: {run.name} needs a set {unknown[0]!r} that is not among sets:")
        return suite


def main(words: list[str]) -> None:
    """`dinov2 eval BACKBONE suite=NAME SET=PATH … output=DIR [key=value …]`."""
    (named,) = [word for word in words if word.startswith(WORD)] or [""]
    backbone, *rest = [word for word in words if word != named]
    suite = Suite.read(recipe_path("suites", named.removeprefix(WORD)))
    if any(word in ("-h", "--help") for word in rest):
        print(_help(named, suite))
        sys.exit(0)
    given, chosen = _sorted_words(suite, [word for word in rest if word != CHECK])
    todo = [run for run in suite.runs if set(run.needs) <= set(given)]
    _say_left_out(suite, given)
    if not todo:
        raise UserError("nothing to do: give at least one set of " + ", ".join(suite.sets))
    # All settings are read before the first task starts: a typo is said now, not in an hour.
    configs = [_config(run, backbone, given, chosen) for run in todo]
    if CHECK in rest:
        for run in todo:
            print(f"{run.name}: dinov2 eval {backbone} {run.task} {' '.join(run.words(given, chosen))}")
        return
    with process_group(pick_device(configs[0].device), minutes=MINUTES):
        failed = [_outcome(run, config) for run, config in zip(todo, configs, strict=True)]
    if is_main():
        _finish(todo, [one for one in failed if one], configs[0].output)


def _outcome(run: Run, config: EvalConfig) -> tuple[Run, Exception] | None:
    """Measure, and say so; or what went wrong, after which the next one goes on."""
    try:
        _, result = evaluate(run.task, config)
    except RunAgain:
        raise
    except SystemExit:  # of several ranks this is not the one that knows
        return None
    except Exception as error:
        if not isinstance(error, Stop):
            traceback.print_exc()
        print(f"{run.name}: failed: {_line(error)}", file=sys.stderr, flush=True)
        return run, error
    if is_main():
        print(f"{run.name}: {described(result)}", flush=True)
    return None


def _finish(todo: Sequence[Run], failed: Sequence[tuple[Run, Exception]], output: str) -> None:
    print(f"{len(todo) - len(failed)} of {len(todo)} done; all results: {output}/{REPORT}")
    if not failed:
        return
    named = "; ".join(f"{run.name}: {_line(error)}" for run, error in failed)
    text = f"{len(failed)} of {len(todo)} failed, the others are done ({named})"
    kinds = [type(error) for _, error in failed]
    if all(issubclass(kind, UserError) for kind in kinds):
        raise UserError(text)
    if all(issubclass(kind, Stop) for kind in kinds):
        raise NoProgress(text)
    raise Bug(text)


class Bug(Stop):
    """Something that no user can mend was among what failed; its traceback was printed where it happened."""

    status = 1


def _run(one: Any, path: Path) -> Run:
    if not isinstance(one, dict) or one.get("task") not in TASKS:
        named = one.get("task") if isinstance(one, dict) else one
        near = get_close_matches(str(named), TASKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "there are: " + ", ".join(sorted(TASKS))
        raise UserError(f"{path}: there is no task {named!r}; {hint}")
    settings = {key: value for key, value in one.items() if key not in OWN}
    needs = NEEDED.findall(" ".join(map(str, settings.values())))
    name = one.get("name") or " ".join([one["task"], *dict.fromkeys(needs)])
    return Run(name, one["task"], one.get("recipe"), settings)


def _sorted_words(suite: Suite, words: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The sets that are given, and the settings."""
    tasks = {run.task: TASKS[run.task] for run in suite.runs}
    known = {field.name for task in tasks.values() for field in fields(task.config)}
    known |= {f"{name}.{field.name}" for name, task in tasks.items() for field in fields(task.config)}
    known -= {"backbone", "data", "train", "test"}
    given, chosen = {}, {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{word!r} is not understood: sets and settings are written key=value")
        if key not in suite.sets and key not in known:
            near = get_close_matches(key, [*suite.sets, *known], n=1)
            hint = f"did you mean {near[0]!r}?" if near else "sets: " + ", ".join(suite.sets)
            raise UserError(f"{word}: the suite has no set, and no task a setting, {key!r}; {hint}")
        (given if key in suite.sets else chosen)[key] = value
    return given, chosen


def _config(run: Run, backbone: str, given: dict[str, str], chosen: dict[str, str]) -> EvalConfig:
    try:
        words = [*run.words(given, chosen), f"backbone={backbone}"]
        return read(TASKS[run.task].config, words, recipes="evals")
    except UserError as error:
        raise UserError(f"{run.name}: {error}") from None


def _say_left_out(suite: Suite, given: dict[str, str]) -> None:
    for run in suite.runs:
        if missing := [f"{name}=" for name in run.needs if name not in given]:
            print(f"{run.name}: left out, for it needs {' and '.join(missing)}", flush=True)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, Stop) else f"{type(error).__name__} {text}"


def _help(named: str, suite: Suite) -> str:
    width = max(map(len, suite.sets))
    sets = [f"  {name + '=':<{width + 1}} {text}" for name, text in suite.sets.items()]
    runs = [f"  {run.name}" for run in suite.runs]
    return "\n".join([(__doc__ or "").strip(), "", f"sets of {named}:", *sets, "", "runs:", *runs])
