"""From a messy pool of pictures to a measured backbone: curate, train, evaluate, and one page about it.

usage: python -m demo output=DIR [images=DIR|imagenette] [seed=0]

The page is DIR/report.html. The same command continues a demo that was stopped anywhere.
"""

import time
from pathlib import Path

from demo.config import DemoConfig
from demo.inputs import Inputs, known_test, make_inputs, read_inputs
from demo.stages import Stage, Stages, python
from dinov2.config import read, recipe_path
from dinov2.console import run
from dinov2.files import read_json
from dinov2.folders import claim


def main(words: list[str]) -> None:
    """`make demo`."""
    began = time.perf_counter()
    config = read(DemoConfig, words, doc=__doc__ or "")
    recipe_path("curation", config.curation)  # a misspelt one is named now, not in three minutes
    recipe_path("train", config.training)
    with claim(config.output, config) as folder:
        demo(config, Stages(folder.resolve(), began))


def demo(config: DemoConfig, stages: Stages) -> None:
    """The whole job. Each stage is a program of its own that reads the files of those before it."""
    folder = stages.folder
    stages.run(Stage("pictures", "making the pictures", lambda: make_inputs(config, folder)))
    inputs = read_inputs(folder)
    stages.run(Stage("curation", "curating the pool", lambda: [_curate(config, inputs, folder)]))
    stages.run(Stage("training", "training the backbone", lambda: [_train(config, inputs, folder)]))
    if inputs.labelled:
        stages.run(Stage("evaluation", "evaluating it", lambda: _evaluate(config, inputs, folder)))
    stages.run(Stage("page", "drawing the page", lambda: [python("demo.page", str(folder))]))
    stages.say("done")
    print((folder / "summary.txt").read_text(), end="")
    print(f"The page: {Path(config.output) / 'report.html'}")


def _curate(config: DemoConfig, inputs: Inputs, folder: Path) -> list[str]:
    return python(
        "curation",
        config.curation,
        f"pool={inputs.pool}",
        *([f"seeds={inputs.seeds}"] if inputs.seeds else []),
        f"holdout={inputs.test}",
        f"output={folder / 'curated'}",
        f"seed={config.seed}",
        f"workers={config.workers}",
    )


def _train(config: DemoConfig, inputs: Inputs, folder: Path) -> list[str]:
    curated = folder / "curated"
    watched = [f"knn.train={curated}", f"knn.test={inputs.test}"] if inputs.labelled else []
    return python(
        "dinov2.train",
        config.training,
        f"data={curated}",
        *watched,
        f"output={folder / 'run'}",
        f"seed={config.seed}",
    )


def _evaluate(config: DemoConfig, inputs: Inputs, folder: Path) -> list[list[str]]:
    """k-NN of all three, linear probes of the two backbones; pictures are as large as in training."""
    backbone = folder / "run" / "backbone"
    untrained = f"untrained:{backbone}?seed={config.seed}"
    size = read_json(backbone / "config.json")["image_size"]
    test = known_test(inputs, folder)
    tasks = [(spec, "knn") for spec in ("pixels", untrained, str(backbone))]
    tasks += [(spec, "linear") for spec in (untrained, str(backbone))]
    return [
        python(
            "evals",
            spec,
            task,
            *(["demo"] if task == "linear" else []),
            f"train={folder / 'curated'}",
            f"test={test}",
            f"size={size}",
            f"resize={size}",
            f"output={folder / 'evals'}",
        )
        for spec, task in tasks
    ]


if __name__ == "__main__":
    run(main, "demo")
