"""A training step of ours in several forms, and lightly-train's, each in a process of its own.

ViT-S/14, 8 pictures, 2 x 224 + 8 x 98 pixels, 65,536 prototypes, one head for image and patch tokens, random
pixels. The first step is warmth; the median of the others counts. What is compared takes steps in turn, so
that the machine's better and worse minutes are everybody's; there are three rounds. PEER names an interpreter
that has lightly-train, in an environment of its own: it reads pictures, and is timed from batch to batch
without the reading. Without it only our own forms are measured.
"""

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
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
from tests.benchmarks.figures import Rows
from tests.benchmarks.plain_step import Plain
from tests.benchmarks.turns import in_turn, next_turn
from tests.pictures import encoded, picture

BATCH = 8
WORDS = f"""data=x output=x steps=100 batch={BATCH} model.size=vit_small model.patch=14
augment.local_size=98 heads.separate=false heads.dino.prototypes=65536""".split()
# The plain form is frozen: nothing that our step leaves out or does otherwise may help it.
FORMS = {
    "plain fp32": ["onednn=false", "keep_memory=false", "model.checkpointing=none"],
    "fp32": [],
    "bf16": [],
}
PEERS = {"lightly-train, its default": "auto", "lightly-train, fp32": "32-true"}
COMPARED = {"the defaults of both": "bf16", "fp32 on both sides": "fp32"}  # with each of them
TIMES = "seconds", "processor"
ROUNDS = 3
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
    mark("forward")
    outcome.total(config.weights()).backward()
    mark("backward")
    clip_gradients(state.student.parts(), config.optim.clip, config.optim.clip_per)
    mark("clipping")
    update_average(state.teacher, state.student, rates.momentum_before)
    state.optimizer.step()
    update_average(state.teacher, state.student, rates.momentum)
    mark("optimiser and teacher")
    return {name: at - marks[place][1] for place, (name, at) in enumerate(marks[1:])}


def prepared(words: list[str]) -> tuple[TrainConfig, State, Views]:
    """As `dinov2 train` begins."""
    config = read(TrainConfig, [*WORDS, *words])
    if config.keep_memory:
        keep_freed_memory()
    return config, fresh_state(config, "", CPU), views(config)


def ours(form: str) -> None:
    """A step of one of our forms for each turn."""
    config, state, shown = prepared([f"precision={'bf16' if form == 'bf16' else 'fp32'}", *FORMS[form]])
    timed: Callable[[int], dict[str, float]] = partial(one_step, config, state, shown)
    if form == "plain fp32":
        optimizer = torch.optim.AdamW(state.student.parameters())
        plain = Plain(state.student, state.teacher, optimizer, 0.04, 0.992, config.model.drop_path)
        timed = partial(_plain_step, plain, shown)
    for step in itertools.count(1):
        begin = time.process_time()
        seconds = sum(timed(step).values())
        if not next_turn({"seconds": seconds, "processor": time.process_time() - begin}):
            break


def _plain_step(plain: Plain, shown: Views, step: int) -> dict[str, float]:
    start = time.perf_counter()
    plain.step(shown)
    return {"step": time.perf_counter() - start}


def measured(peer: str, steps: int) -> dict[str, dict[str, Any]]:
    """Every form in a process of its own. All at once would not fit into this machine's memory."""
    own = {form: [sys.executable, "-m", __name__, form] for form in FORMS}
    with tempfile.TemporaryDirectory() as folder:
        if not peer:
            return in_turn(own, steps)
        pictures(Path(folder) / "pictures", 2 * BATCH)
        script = [peer, "-m", "tests.benchmarks.lightly_step", folder, str(steps)]
        theirs = {form: [*script, precision] for form, precision in PEERS.items()}
        found: dict[str, dict[str, Any]] = {}
        for (peers, words), form in zip(theirs.items(), COMPARED.values(), strict=True):
            plain = {} if found else {"plain fp32": own["plain fp32"]}
            found |= in_turn({**plain, form: own[form], peers: words}, steps)
        return found


def pictures(folder: Path, count: int) -> None:
    """JPEGs of 500 x 375."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        path = folder / f"{number}.jpg"
        path.write_bytes(encoded(picture(number, 0, (500, 375)), "jpg", quality=88))


def rows(peer: str, steps: int) -> Rows:
    """Every form beside the plain one, and the ratios that are asked for, of each round."""
    rounds = [measured(peer, steps) for _ in range(ROUNDS)]
    table = []
    for form in rounds[0]:
        mine = [found[form] for found in rounds]
        seconds, busy = (statistics.median(_median(said, what) for said in mine) for what in TIMES)
        said = f"{seconds:.2f} s ({busy:.1f} of processor time), {max(each['gib'] for each in mine):.2f} GiB"
        if form != "plain fp32":
            ratio = _each(_median(found["plain fp32"]) / _median(found[form]) for found in rounds)
            said += f", {ratio} times as fast as the plain form"
        table.append((form, said))
    if not peer:
        return [*table, ("lightly-train", "not measured: PEER names no interpreter that has it")]
    for peers, (what, form) in zip(PEERS, COMPARED.items(), strict=True):
        pairs = [(found[form], found[peers]) for found in rounds]
        faster, busy = (
            _each(_median(them, time) / _median(us, time) for us, them in pairs) for time in TIMES
        )
        held = _each(us["gib"] / them["gib"] for us, them in pairs)
        said = f"**{faster} times as fast, {held} of its peak memory** (by processor time {busy})"
        table.append((f"against lightly-train {pairs[0][1]['version'][0]}, {what}", said))
    return table


def _each(ratios: Iterable[float]) -> str:
    return ", ".join(f"{ratio:.2f}" for ratio in ratios)


def _median(said: dict[str, Any], what: str = "seconds") -> float:
    return statistics.median(said[what][1:])


if __name__ == "__main__":
    ours(sys.argv[1])
