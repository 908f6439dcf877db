"""From a messy pool of pictures to a measured backbone: curate, train, evaluate, and one page about it.

usage: python -m demo output=DIR [images=DIR|imagenette] [seed=0]

The page is DIR/report.html. The same command continues a demo that was stopped anywhere.
"""

import sys
import time
from pathlib import Path

from demo.config import DemoConfig
from demo.inputs import Inputs, make_inputs, read_inputs
from demo.stages import Stage, Stages, python
from dinov2.config import read, recipe_path
from dinov2.console import run
from dinov2.folders import claim


def main(words: list[str]) -> None:
    """`make demo`."""
    began = time.perf_counter()
    config = read(DemoConfig, words, doc=__doc__ or "")
    recipe_path("curation", config.curation)
    recipe_path("train", config.training)
    with claim(config.output, config) as folder:
        stages = Stages(folder.resolve(), began)
        demo(config, stages)


def demo(config: DemoConfig, stages: Stages) -> None:
    """The whole job; each stage is a program of its own that reads what the ones before have left."""
    folder = stages.folder
    stages.run(Stage("pictures", "making the pictures", lambda: make_inputs(config, folder)))
    inputs = read_inputs(folder)
    stages.run(Stage("curate", "curating the pool", [_curate(config, inputs, folder)]))
    stages.run(Stage("train", "training the backbone", [_train(config, inputs, folder)]))
    if inputs.labelled:
        stages.run(Stage("evaluate", "evaluating it", _evaluate(config, inputs, folder)))
    stages.run(Stage("page", "drawing the page", [python("demo.page", f"output={folder}")]))
    stages.say(f"done: {folder / 'report.html'}")
    print((folder / "summary.txt").read_text(), end="")


def _curate(config: DemoConfig, inputs: Inputs, folder: Path) -> list[str]:
    seeds = [f"seeds={inputs.seeds}"] if inputs.seeds else []
    return python(
        "curation",
        config.curation,
        f"pool={inputs.pool}",
        *seeds,
        f"holdout={inputs.test}",
        f"output={folder / 'curated'}",
        f"seed={config.seed}",
        f"workers={config.workers}",
    )
