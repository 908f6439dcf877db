"""`make bench-training`: our training against lightly-train's DINOv2, as many minutes of one core each.

    python -m tests.benchmarks.contest data=FOLDER output=DIR [lightly=PYTHON] [minutes=20] [seeds=0,1,2]
                                       [steps=N] [store=docs/benchmarks/training.json]

FOLDER has train/ and val/ of class folders. PYTHON is that of an environment of its own with lightly-train.
Ours is the recipe `OURS`, theirs `tests/benchmarks/contest_lightly.json`; both were tuned on a part of train.

Time is a process's own (user and system, one thread, no workers), for programs that share a machine slow each
other by the clock. A short run of each, side by side as all runs are, says how many steps fill the minutes:
schedules need a length. (steps= gives one to both, to try the program itself.) Teachers are written after a
quarter, a half and the whole of a run, and scored by `dinov2 eval … knn` on the CLS token: neighbours among
all of train, tested on val. Figures go to `store`, a table to the standard output, from where
docs/benchmarks/training.md has it. The same command continues with the runs that are not whole.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from dinov2.config import recipe_path
from evals.evaluate import evaluate
from evals.knn import KNNConfig
from tests.benchmarks.curation import ROOT

OURS = "small_minutes"
THEIRS = Path(__file__).with_name("contest_lightly.json")
STORE = ROOT / "docs" / "benchmarks" / "training.json"
QUIET = "tensorboard=false watch.snapshots=0 watch.peak_tflops=1 watch.hang_limit=0 workers=0 threads=1"
WORDS = f"augment.mode=fast {QUIET}"
PROBES = 8, 40  # steps of the two short runs
QUARTERS = (1, 2, 4)  # of a run, after which its teacher is scored


@dataclass(frozen=True)
class Contest:
    """What is run, and where it goes."""

    data: Path
    output: Path
    lightly: str  # the other environment's Python; empty: ours alone
    minutes: float

    @property
    def trainers(self) -> list[str]:
        return ["ours", "lightly"] if self.lightly else ["ours"]

    def train(self, trainer: str, name: str, steps: int, seed: int) -> dict[str, float]:
        """One run, unless it is done; what it took."""
        out = self.output / f"{trainer}-{name}"
        done = out.with_suffix(".json")
        if done.exists() and (found := json.loads(done.read_text()))["steps"] == steps:
            return found
        shutil.rmtree(out, ignore_errors=True)  # half a run: what it took is not known
        quarter = max(1, steps // 4)
        if trainer == "ours":
            marks = f"checkpoint.every={quarter} checkpoint.export_every={quarter} checkpoint.keep=1"
            words = f"{OURS} data={self.data / 'train'} output={out} epochs=0 steps={steps} seed={seed}"
            command = [sys.executable, "-m", "dinov2.train", *f"{words} {WORDS} {marks}".split()]
        else:
            told = json.loads(THEIRS.read_text()) | {"out": str(out), "data": str(self.data / "train")}
            told |= {"steps": steps, "seed": seed, "marks": [quarter * part for part in QUARTERS]}
            settings = self.output / f"{trainer}-{name}.settings.json"
            settings.write_text(json.dumps(told))
            command = [self.lightly, str(ROOT / "tests" / "benchmarks" / "lightly_run.py"), str(settings)]
        with open(out.with_suffix(".log"), "wb") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            child = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=environment)
            _, status, used = os.wait4(child.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(command)}\nended with {status}, see {out.with_suffix('.log')}")
        found = {"steps": steps, "seed": seed, "cpu_minutes": (used.ru_utime + used.ru_stime) / 60}
        if steps not in PROBES:
            done.write_text(json.dumps(found))
        return found

    def together(self, name: str, steps: dict[str, int], seed: int) -> dict[str, dict[str, float]]:
        """The same run of each trainer, at the same time."""
        with ThreadPoolExecutor() as pool:
            runs = {
                trainer: pool.submit(self.train, trainer, name, steps[trainer], seed) for trainer in steps
            }
        return {trainer: run.result() for trainer, run in runs.items()}

    def lengths(self) -> dict[str, int]:
        """Steps that fill the minutes, a multiple of four."""
        store = self.output / "steps.json"
        if not store.exists():
            short, long = (
                self.together(f"probe{steps}", dict.fromkeys(self.trainers, steps), 0) for steps in PROBES
            )
            found = {}
            for trainer in self.trainers:
                start, end = short[trainer]["cpu_minutes"], long[trainer]["cpu_minutes"]
                a_step = (end - start) / (PROBES[1] - PROBES[0])
                found[trainer] = int((self.minutes - start) / a_step + PROBES[0]) // 4 * 4
            store.write_text(json.dumps(found))
        return json.loads(store.read_text())

    def backbone(self, trainer: str, name: str, step: int) -> str:
        """The word for the teacher of a step."""
        if trainer == "ours":
            return str(self.output / f"ours-{name}" / "backbones" / f"{step:08d}")
        network = json.loads(THEIRS.read_text())["network"]
        shape = f"vit_tiny/{network['patch_size']}&dim={network['embed_dim']}&depth={network['depth']}"
        return f"{self.output / f'lightly-{name}' / f'{step:08d}.pth'}?architecture={shape}&position=release"

    def score(self, backbone: str, trainer: str = "ours") -> float:
        """Top-1 in percent, k = 20."""
        size = settings_of(trainer)[0]
        config = KNNConfig(
            backbone=backbone,
            train=str(self.data / "train"),
            test=str(self.data / "val"),
            output=str(self.output / "evals"),
            size=size,
            resize=size,
        )
        return evaluate("knn", config)[1]["metrics"]["top1_k20"]


def settings_of(trainer: str) -> tuple[int, int]:
    """Pixels along a side, and pictures a step."""
    if trainer == "ours":
        recipe = yaml.safe_load(recipe_path("train", OURS).read_text())
        return recipe["augment"]["global_size"], recipe["batch"]
    told = json.loads(THEIRS.read_text())
    return told["transform_args"]["image_size"][0], told["batch_size"]


def where(lightly: str) -> str:
    """Date, machine and versions."""
    about = (
        line.partition(": ")[2]
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    )
    found = [time.strftime("%Y-%m-%d"), f"one core of {next(about, platform.machine())} for each run"]
    found += [f"Python {platform.python_version()}", f"torch {version('torch')}"]
    if lightly:
        ask = "from importlib.metadata import version as v; print('lightly-train', v('lightly-train'))"
        told = subprocess.run([lightly, "-c", ask], capture_output=True, text=True, check=True)
        found.append(told.stdout.strip())
    return ", ".join(found)


def measured(contest: Contest, steps: dict[str, int], seed: int) -> Iterator[dict[str, Any]]:
    """The runs of one seed and their curves, and the untrained backbone with that seed."""
    for trainer, run in contest.together(f"seed{seed}", steps, seed).items():
        marks = [steps[trainer] // 4 * part for part in QUARTERS]
        curve = [contest.score(contest.backbone(trainer, f"seed{seed}", mark), trainer) for mark in marks]
        pictures = steps[trainer] * settings_of(trainer)[1]
        yield {"trainer": trainer, "pictures": pictures, "curve": curve} | run
    fresh = f"untrained:{contest.backbone('ours', f'seed{seed}', steps['ours'])}?seed={seed}"
    yield {"trainer": "untrained", "seed": seed, "curve": [contest.score(fresh)]}


def table(found: dict[str, Any]) -> Iterator[str]:
    """Each run's curve, and the mean over seeds, as Markdown."""
    minutes = [found["minutes"] / 4 * part for part in QUARTERS]
    heads = [
        "",
        "seed",
        *(f"{each:g} min" for each in minutes),
        "CPU minutes",
        "pictures",
        "pictures a CPU second",
    ]
    yield from (f"| {' | '.join(heads)} |", "|---" * len(heads) + "|")
    for name in dict.fromkeys(run["trainer"] for run in found["runs"]):
        runs = [run for run in found["runs"] if run["trainer"] == name]
        for run in runs:
            scores = [f"{score:.1f}" for score in run["curve"]] + [""] * (len(QUARTERS) - len(run["curve"]))
            spent = run.get("cpu_minutes")
            rate = (
                ["", "", ""]
                if spent is None
                else [f"{spent:.1f}", f"{run['pictures']:,}", f"{run['pictures'] / spent / 60:.1f}"]
            )
            yield f"| {' | '.join([name, str(run['seed']), *scores, *rate])} |"
        means = [
            f"**{sum(scores) / len(scores):.1f}**"
            for scores in zip(*(run["curve"] for run in runs), strict=True)
        ]
        yield f"| {' | '.join([name, 'mean', *means, *[''] * (len(heads) - 2 - len(means))])} |"
    yield f"| raw pixels | | **{found['pixels']:.1f}** |" + " |" * (len(heads) - 3)


def main(words: list[str]) -> None:
    told = dict(word.split("=", 1) for word in words)
    minutes = float(told.get("minutes", 20))
    contest = Contest(Path(told["data"]), Path(told["output"]), told.get("lightly", ""), minutes)
    contest.output.mkdir(parents=True, exist_ok=True)
    store = Path(told.get("store", STORE))
    given = int(told.get("steps", 0)) // 4 * 4
    steps = dict.fromkeys(contest.trainers, given) if given else contest.lengths()
    found: dict[str, Any] = {"minutes": minutes, "where": where(contest.lightly), "runs": []}
    for seed in map(int, told.get("seeds", "0,1,2").split(",")):
        found["runs"] += measured(contest, steps, seed)
        found["pixels"] = contest.score("pixels")
        store.write_text(json.dumps(found, indent=1) + "\n")
        print(found["where"], *table(found), sep="\n", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
