"""`make bench`: a training step against its plain form and against lightly-train, as a page.

    python -m tests.benchmarks.step [peer=PYTHON] [steps=6] [page=docs/benchmarks/step.md]

ViT-S/14, 8 pictures, 2 x 224 + 8 x 98 pixels, 65,536 prototypes, random pixels; every form in a process of
its own, one after the other. The first step is warmth; the median of the others counts. `peer` is an
interpreter that has lightly-train, in an environment of its own: it reads pictures, and is timed from batch
to batch without the reading. Without it only our own forms are measured.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dinov2.allocator import keep_freed_memory
from dinov2.config import read
from dinov2.data.masks import draw_masks
from dinov2.optim import Schedules, clip_gradients, set_rates, update_average
from dinov2.ssl.objective import Views
from dinov2.train.config import TrainConfig
from dinov2.train.loop import objective_of
from dinov2.train.state import State, fresh_state
from tests.benchmarks.plain_step import Plain

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "benchmarks" / "step.md"
BATCH = 8
WORDS = f"""data=x output=x steps=100 batch={BATCH} model.size=vit_small model.patch=14
augment.local_size=98 heads.separate=false heads.dino.prototypes=65536""".split()
OURS = ("plain fp32", "fp32", "bf16")
PEERS = {"lightly-train, its default": "auto", "lightly-train, fp32": "32-true"}
CPU = torch.device("cpu")


def views(config: TrainConfig) -> Views:
    draw = torch.Generator().manual_seed(0)
    side = config.augment.global_size // config.model.patch
    return Views(
        global_crops=torch.randn(2 * BATCH, 3, 224, 224, generator=draw),
        local_crops=torch.randn(8 * BATCH, 3, 98, 98, generator=draw),
        masks=draw_masks(
            config.masks, grid=(side, side), crops=list(range(2 * BATCH)), total=2 * BATCH, seed=1, step=1
        ),
    )


def one_step(config: TrainConfig, state: State, shown: Views, step: int) -> dict[str, float]:
    """What the loop does between a batch and its line of metrics; seconds by part."""
    marks = [("", time.perf_counter())]

    def mark(name: str) -> None:
        marks.append((name, time.perf_counter()))

    plan = Schedules(optim=config.optim, teacher=config.teacher, steps=100, batch=BATCH, pictures=800)
    rates = plan.at(step)
    set_rates(state.optimizer, rates)
    state.optimizer.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(step)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
        outcome = objective_of(config)(
            state.student, state.guide, shown, rates, state.centers, generator=generator
        )
    mark("both networks forward, losses with their gradients at the scores")
    outcome.total(config.weights()).backward()
    mark("backward")
    clip_gradients(state.student.parts(), config.optim.clip, config.optim.clip_per)
    mark("clipping")
    update_average(state.teacher, state.student, rates.momentum_before)
    state.optimizer.step()
    update_average(state.teacher, state.student, rates.momentum)
    mark("optimiser and teacher")
    return {name: at - marks[place][1] for place, (name, at) in enumerate(marks[1:])}


def ours(form: str, steps: int) -> dict[str, Any]:
    """Seconds of each step and part, and the peak memory, of one of our forms."""
    config = read(TrainConfig, [*WORDS, f"precision={'bf16' if form == 'bf16' else 'fp32'}"])
    if config.keep_memory:
        keep_freed_memory()
    state, shown = fresh_state(config, "", CPU), views(config)
    if form.startswith("plain"):
        optimizer = torch.optim.AdamW(state.student.parameters())
        plain = Plain(state.student, state.teacher, optimizer, 0.04, 0.992, config.model.drop_path)
        timed: Callable[[int], dict[str, float]] = lambda step: _timed(lambda: plain.step(shown))  # noqa: E731
    else:
        timed = lambda step: one_step(config, state, shown, step)  # noqa: E731
    parts = [timed(step) for step in range(1, steps + 1)]
    held = next(
        int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return {"seconds": [sum(own.values()) for own in parts], "parts": parts[1:], "gib": held / 2**20}


def _timed(work: Callable[[], object]) -> dict[str, float]:
    start = time.perf_counter()
    work()
    return {"step": time.perf_counter() - start}


def measured(peer: str, steps: int) -> dict[str, dict[str, Any]]:
    """Every form in a process of its own."""
    found = {}
    for form in OURS:
        said = _run([sys.executable, "-m", __spec__.name, "inside", form, str(steps)])
        found[form] = said
    with tempfile.TemporaryDirectory() as folder:
        if peer:
            _pictures(Path(folder))
        for form, precision in PEERS.items() if peer else ():
            script = str(Path(__file__).with_name("lightly_step.py"))
            found[form] = _run([peer, script, folder, str(steps), precision])
    return found


def _run(words: list[str]) -> dict[str, Any]:
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stderr[-2000:]}")
    said = json.loads(done.stdout.splitlines()[-1])
    print(f"{words[-2]} {words[-1]}: {median(said):.2f} s, {said['gib']:.2f} GiB", flush=True)
    return said


def _pictures(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for number in range(2 * BATCH):
        pixels = draw.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")


def median(said: dict[str, Any]) -> float:
    return statistics.median(said["seconds"][1:])


def page(found: dict[str, dict[str, Any]]) -> str:
    """The page: every form beside the others, and the parts of ours."""
    about = (
        line.partition(": ")[2]
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    where = f"{len(os.sched_getaffinity(0))} cores of {next(about, platform.machine()).strip()}"
    peers = {said["version"] for said in found.values() if "version" in said}
    lines = [
        "# A training step",
        "",
        "Made by `make bench`: ViT-S/14, 8 pictures a step, 2 x 224 + 8 x 98 pixels, 65,536 prototypes,",
        "one head for image and patch tokens; the median of the steps after the first; each form in a",
        "process of its own. `plain` is `tests/benchmarks/plain_step.py`.",
        "",
        f"{time.strftime('%Y-%m-%d')}, {where}, Python {platform.python_version()}, torch {version('torch')}"
        + "".join(f", lightly-train {one}" for one in peers),
        "",
        "| form | seconds a step | of plain | peak memory |",
        "|---|---|---|---|",
    ]
    base = median(found["plain fp32"])
    for form, said in found.items():
        lines.append(f"| {form} | {median(said):.2f} | {median(said) / base:.2f} | {said['gib']:.2f} GiB |")
    if all(form in found for form in PEERS):
        default, same = (found[form] for form in PEERS)

        def held(form: str, theirs: dict[str, Any]) -> str:
            return f"{found[form]['gib'] / theirs['gib']:.2f}"

        lines += [
            "",
            f"Against lightly-train: {median(default) / median(found['bf16']):.2f} times as fast at the",
            f"defaults of both, {median(same) / median(found['fp32']):.2f} times in float32 on both sides;",
            f"peak memory {held('bf16', default)} and {held('fp32', same)} of its.",
        ]
    lines += ["", "| part | fp32 | bf16 |", "|---|---|---|"]
    for part in found["bf16"]["parts"][0]:
        own = [statistics.median(step[part] for step in found[form]["parts"]) for form in ("fp32", "bf16")]
        lines.append(f"| {part} | {own[0]:.2f} s | {own[1]:.2f} s |")
    return "\n".join(lines) + "\n"


def main(words: list[str]) -> None:
    if words and words[0] == "inside":
        print(json.dumps(ours(words[1], int(words[2]))))
        return
    told = dict(word.split("=", 1) for word in words)
    found = measured(told.get("peer", ""), int(told.get("steps", 6)))
    target = Path(told.get("page", PAGE))
    target.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    target.write_text(page(found))
    print(target.read_text())


if __name__ == "__main__":
    main(sys.argv[1:])
