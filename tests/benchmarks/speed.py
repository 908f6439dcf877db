"""`make bench`: a training step against its peers and its floors, data, order and start, as a page.

    python -m tests.benchmarks.speed [NAME …] [scale=0.5] [page=docs/benchmarks/speed.md]

How it is measured: see `tests.benchmarks.figures`. PEER names an interpreter that has lightly-train, in an
environment of its own; without it only our own forms are measured. The scale is of the number of steps. The
pictures are made by `tests.pictures`, 500 x 375, JPEG of quality 88.
"""

import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import dinov2.vision_ops  # noqa: F401  # for what its import does: torchvision can be imported

import numpy as np
import torch
from PIL import Image

from dinov2.data.augment import AugmentConfig, MultiCrop
from dinov2.data.fast import FastCrop
from dinov2.data.loader import batches
from dinov2.data.order import Order
from dinov2.data.sources import open_source
from dinov2.train.feed import feed
from tests.benchmarks import step as forms
from tests.benchmarks import step_parts
from tests.benchmarks.figures import ROOT, Benchmark, Rows, run
from tests.dinov2.data.test_augment import plans_of, psnr, reference
from tests.pictures import class_folder

PAGE = ROOT / "docs" / "benchmarks" / "speed.md"
CROPS = AugmentConfig(local_size=98)
TURNS, READ_AHEAD = 3, 3.0  # of steps with the loader and without; seconds in which it fills what it holds
SMALL = [
    "model.size=vit_tiny",
    "model.patch=16",
    "model.depth=4",
    "heads.dino.prototypes=1024",
    "heads.ibot.prototypes=1024",
    "heads.dino.hidden=256",
    "heads.ibot.hidden=256",
    "augment.global_size=96",
    "augment.local_size=48",
    "batch=8",
    "steps=1",
    "watch.snapshots=0",
    "tensorboard=false",
]


def step(scale: float, data: Path) -> Rows:
    """Our forms of a step and lightly-train's, all of them three times over."""
    return forms.rows(os.environ.get("PEER", ""), max(3, round(4 * scale)))


def parts(scale: float, data: Path) -> Rows:
    """Where the time of our default step goes."""
    return step_parts.rows(max(2, round(4 * scale)))


def loader(scale: float, data: Path) -> Rows:
    """Our default step with its pictures from files, by the default number of workers, and without."""
    steps = max(2, round(3 * scale))
    with tempfile.TemporaryDirectory() as folder:
        forms.pictures(Path(folder) / "pictures", 64)
        config, state, fixed = forms.prepared([])
        source = open_source(str(Path(folder) / "pictures"), cache=Path(folder) / "cache")
        stream = feed(config, source, forms.CPU, int, first=0, last=TURNS * (steps + 1) + 2)
        without: list[float] = []
        loaded: list[float] = []
        for _ in range(TURNS):
            without += [_step_seconds(lambda: fixed, config, state) for _ in range(steps + 1)][1:]
            loaded += [_step_seconds(lambda: next(stream)[0], config, state) for _ in range(steps + 1)][1:]
            time.sleep(READ_AHEAD)  # or workers would do so beside the steps that need nothing of theirs
        stream.close()  # pyright: ignore[reportAttributeAccessIssue]  # a generator
    share = statistics.median(without) / statistics.median(loaded)
    return [
        ("a step without the loader", f"{statistics.median(without):.2f} s"),
        (
            f"with it, workers={config.workers}",
            f"{statistics.median(loaded):.2f} s, **{share:.1%} of the speed**",
        ),
    ]


def _step_seconds(
    views_of: Callable[[], forms.Views], config: forms.TrainConfig, state: forms.State
) -> float:
    start = time.perf_counter()
    forms.one_step(config, state, views_of(), 1)
    return time.perf_counter() - start


def augmentation(scale: float, data: Path) -> Rows:
    """Pictures a second of processor time, from the file's bytes to uint8 crops, in one thread."""
    torch.set_num_threads(1)
    exact, fast = MultiCrop(CROPS), FastCrop(CROPS)
    with tempfile.TemporaryDirectory() as folder:
        forms.pictures(Path(folder), max(8, round(40 * scale)))
        files = [path.read_bytes() for path in sorted(Path(folder).iterdir())]
        ways: dict[str, Callable[[bytes, int], object]] = {
            "torchvision on Pillow": lambda file, seed: _by_pillow(exact, file, seed),
            "exact": lambda file, seed: exact(exact.open(file), seed),
            "fast": lambda file, seed: fast(fast.open(file), seed),
        }
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(4):  # in turn: other programs may share the machine
            for name, way in ways.items():
                start = time.process_time()
                for seed, file in enumerate(files):
                    way(file, seed)
                best[name] = min(best[name], (time.process_time() - start) / len(files))
        found = [
            (name, f"{1 / seconds:.0f} pictures/s, {best['torchvision on Pillow'] / seconds:.1f} x Pillow's")
            for name, seconds in best.items()
        ]
        if peer := os.environ.get("PEER"):
            words = [peer, "-m", "tests.benchmarks.lightly_data", folder]
            environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            said = subprocess.run(
                words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
            )
            found.append(
                (
                    "lightly-train's, from file to normalised floats",
                    f"{float(said.stdout.splitlines()[-1]):.0f} pictures/s",
                )
            )
        qualities = list(_qualities(exact, files[:12]))
    return [
        *found,
        (
            "exact against Pillow",
            f"PSNR {min(qualities):.0f} dB at least, {np.mean(qualities):.0f} on average",
        ),
    ]


def _by_pillow(crop: MultiCrop, file: bytes, seed: int) -> list[torch.Tensor]:
    image = Image.open(io.BytesIO(file)).convert("RGB")
    plans = plans_of(crop, image.height, image.width, seed)
    sizes = [CROPS.global_size] * 2 + [CROPS.local_size] * CROPS.local_crops
    return [reference(image, plan, size, CROPS.blur_kernel) for plan, size in zip(plans, sizes, strict=True)]


def _qualities(crop: MultiCrop, files: list[bytes]) -> Iterator[float]:
    for seed, file in enumerate(files):
        ours = [own for kind in crop(crop.open(file), seed) for own in kind]
        for own, theirs in zip(ours, _by_pillow(crop, file, seed), strict=True):
            yield psnr(own, theirs)


def order(scale: float, data: Path) -> Rows:
    """The picture at random positions of a run over 1.2 billion, as one of many ranks asks for it."""
    found = []
    for ranks in (1, 32, 256):
        own, draws = Order(1_200_000_000, seed=0), np.random.default_rng(0)
        positions = (draws.integers(0, 10**9, 20_000) * ranks + ranks - 1).tolist()
        start = time.process_time()
        for position in positions:
            own.sample(position)
        each = (time.process_time() - start) / len(positions)
        found.append((f"an index, one of {ranks} ranks", f"{1e6 * each:.1f} µs"))
    return found


def start(scale: float, data: Path) -> Rows:
    """From a command to what it shows first, wall clock, and where a resumed run's batches begin."""
    asked = [_seconds([sys.executable, "-m", "dinov2", "--help"]) for _ in range(5)]
    with tempfile.TemporaryDirectory() as folder:
        pool = Path(folder) / "pool"
        class_folder(pool, classes=4, each=16, size=(500, 375), formats=("jpg",))
        words = [sys.executable, "-m", "dinov2", "train", f"data={pool}", f"output={folder}/run", *SMALL]
        first = _seconds(words, until=Path(folder) / "run" / "metrics.jsonl", lines=1)
        source = open_source(str(pool), cache=Path(folder) / "cache")
        begins = {at: _first_batch(source, at) for at in (0, 0, 10**9)}  # the first one is warmth
    return [
        ("dinov2 --help", f"{min(asked):.2f} s, median of 5 {statistics.median(asked):.2f}"),
        ("dinov2 train, ViT-Ti of 4 blocks: to the line of its first step", f"{first:.1f} s"),
        ("the first batch of a fresh run", f"{begins[0]:.3f} s"),
        ("the first batch of one that resumes at step 1,000,000,000", f"{begins[10**9]:.3f} s"),
    ]


def _first_batch(source: forms.Any, at: int) -> float:
    begin = time.perf_counter()
    crop = MultiCrop(AugmentConfig(global_size=96, local_size=48))
    with closing(
        batches(source, Order(len(source), 0), crop, seed=0, global_batch=8, start_step=at)
    ) as stream:
        next(stream)
    return time.perf_counter() - begin


def _seconds(words: list[str], until: Path | None = None, lines: int = 0) -> float:
    """Until the command has ended, or its file has so many lines; it then runs to its end."""
    begin = time.perf_counter()
    seconds = 0.0
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        while running.poll() is None:
            if until and not seconds and until.exists() and until.read_bytes().count(b"\n") >= lines:
                seconds = time.perf_counter() - begin
            time.sleep(0.005)
    if running.returncode:
        sys.exit(f"{' '.join(words)} ended with status {running.returncode}")
    return seconds or time.perf_counter() - begin


BENCHMARKS: dict[str, Benchmark] = {
    each.__name__: each for each in (step, parts, loader, augmentation, order, start)
}

if __name__ == "__main__":
    run(
        "tests.benchmarks.speed",
        sys.argv[1:],
        BENCHMARKS,
        page=PAGE,
        title="What training costs",
        command="bench",
        packages=("torch", "torchvision", "numpy", "pillow", "simplejpeg", "opencv-python-headless"),
    )
