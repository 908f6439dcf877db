"""Ablations: variants of one recipe, each trained and measured alike, side by side in a table.

usage: dinov2 ablate RECIPE data=SOURCE knn_train=LABELLED knn_test=LABELLED output=DIR [key=value …]

The folder gets a run folder for each variant and seed under runs/, table.md and report.html, both rewritten
after each run. The same command continues: what is done is skipped, what has failed is tried again.
"""

import logging
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dinov2.config import by_name, listed, read, required, runtime
from dinov2.console import run
from dinov2.exits import RunAgain, UserError
from dinov2.files import read_json, write_json, write_text
from dinov2.folders import claim
from dinov2.logs import read_metrics
from dinov2.train.comparison import Result, markdown, page

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """A comparison of `dinov2 ablate`. Every run folder belongs to its own settings, so these may change."""

    base: str = required()  # the recipe of `dinov2 train` that is varied
    words: list[str] = listed()  # settings that all variants have, such as steps=500
    variants: dict[str, list[str]] = runtime(dict)  # settings by name; a list has a phase after the other
    data: str = ""  # pictures to train on, where a variant does not say data=
    sources: dict[str, str] = by_name()  # pictures that a variant's data=NAME means
    knn_train: str = required()  # labelled source to look neighbours up in
    knn_test: str = required()  # labelled source to classify
    seeds: list[int] = runtime([0])  # each variant is trained once for each
    output: str = runtime()  # the folder

    def check(self) -> None:
        """Refuse a comparison of nothing, and sources that are not named."""
        if not self.variants or not all(self.variants.values()):
            raise UserError("variants= is empty: a recipe gives each variant a name and a list of settings")
        for name, phases in self.variants.items():
            if "/" in name:
                raise UserError(f"variants.{name}: names are names of folders, without /")
            if not self.data and not all("data=" in phase for phase in phases):
                raise UserError(f"data= is missing, which the variant {name!r} needs")

    def commands(self, name: str, seed: int) -> list[list[str]]:
        """The words of `dinov2 train` for each phase of a variant; a later one begins from the one before."""
        shared = [f"data={self.data}", f"knn.train={self.knn_train}", f"knn.test={self.knn_test}"]
        found = []
        for phase, words in enumerate(self.variants[name]):
            folder = self.folder(name, seed, phase)
            origin = [f"init={self.folder(name, seed, phase - 1)}"] if phase else []
            own = [self._with_source(word) for word in shlex.split(words)]
            found.append([self.base, *shared, *self.words, f"seed={seed}", *origin, *own, f"output={folder}"])
        return found

    def folder(self, name: str, seed: int, phase: int) -> Path:
        return Path(self.output) / "runs" / f"{name}-seed{seed}{f'-phase{phase + 1}' if phase else ''}"

    def _with_source(self, word: str) -> str:
        key, _, value = word.partition("=")
        return f"data={self.sources[value]}" if key == "data" and value in self.sources else word


def main(words: list[str]) -> None:
    """The `dinov2 ablate` command."""
    config = read(AblationConfig, words, recipes="train", doc=__doc__ or "")
    config.check()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with claim(config.output, config) as folder:
        results: list[Result] = []
        failed: dict[str, str] = {}
        for name, seed in _turns(config):
            try:
                results.append(_result(config, folder, name, seed))
            except Failed as failure:
                failed[f"{name}, seed {seed}"] = str(failure)
            _write(config, folder, results, failed, words)
    if failed:
        named = "; ".join(f"{what}: {why}" for what, why in failed.items())
        raise UserError(f"{len(failed)} of {len(results) + len(failed)} runs failed ({named})")
    print(f"table:  {folder / 'table.md'}\nreport: {folder / 'report.html'}")


class Failed(Exception):
    """A run that ended with neither a result nor a saved state; says its last line."""


def _turns(config: AblationConfig) -> Iterator[tuple[str, int]]:
    """All variants with the first seed, then with the next: the whole table is there early."""
    return ((name, seed) for seed in config.seeds for name in config.variants)


def _result(config: AblationConfig, folder: Path, name: str, seed: int) -> Result:
    """Train a variant, unless it is done, and read off what came of it."""
    commands = config.commands(name, seed)
    path = folder / "results" / f"{name}-seed{seed}.json"
    if path.exists() and (stored := read_json(path))["commands"] == commands:
        return Result(**stored["result"])
    for phase, words in enumerate(commands):
        log.info("%s, seed %d%s", name, seed, f", phase {phase + 1}" if phase else "")
        _train(words, folder / "runs" / f"{config.folder(name, seed, phase).name}.log")
    result = _read(name, seed, [config.folder(name, seed, phase) for phase in range(len(commands))])
    path.parent.mkdir(exist_ok=True)
    write_json(path, {"commands": commands, "result": vars(result)})
    return result


def _train(words: Sequence[str], output: Path) -> None:
    """Run `dinov2 train` in a process of its own, which a failure stays in.

    Raises:
        RunAgain: it was asked to stop, and has saved.
        Failed: it ended otherwise.
    """
    output.parent.mkdir(exist_ok=True)
    with open(output, "ab") as file:
        child = subprocess.Popen([sys.executable, "-m", "dinov2.train", *words], stdout=file, stderr=file)
        before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        try:
            status = child.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
            if child.poll() is None:
                child.terminate()
                child.wait()
    if status == RunAgain.status:
        raise RunAgain("asked to stop; the run is saved, and the same command continues")
    if status:
        said = output.read_text(errors="replace").strip().splitlines()
        raise Failed(said[-1].removeprefix("dinov2 train: ") if said else f"status {status}")


def _read(name: str, seed: int, folders: Sequence[Path]) -> Result:
    curve: list[tuple[int, float, float]] = []
    steps = pictures = 0
    minutes = 0.0
    last: dict[str, Any] = {}
    for folder in folders:
        batch = yaml.safe_load((folder / "config.yaml").read_text())["batch"]
        lines = read_metrics(folder)
        found = [line for line in lines if "knn.teacher" in line]
        curve += [(steps + line["step"], line["knn.teacher"], line["knn.student"]) for line in found]
        timed = [line["pictures_per_second"] for line in lines if line.get("pictures_per_second")]
        last = lines[-1]
        steps += last["step"]
        pictures += last["step"] * batch
        minutes += sum(batch / rate for rate in timed) / 60
    return Result(
        variant=name,
        seed=seed,
        teacher=last["knn.teacher"],
        student=last["knn.student"],
        steps=steps,
        pictures=pictures,
        minutes=minutes,
        curve=curve,
    )


def _write(
    config: AblationConfig, folder: Path, results: list[Result], failed: dict[str, str], words: list[str]
) -> None:
    write_text(folder / "table.md", markdown(results, failed, config.variants))
    command = ["dinov2 ablate", *map(shlex.quote, words)]
    page(folder.name, results, failed, config.variants, command).write(folder / "report.html")


if __name__ == "__main__":
    run(main, "ablate")
