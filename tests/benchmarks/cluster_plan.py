"""The tables of docs/clusters.md: a recipe on so many GPUs, from counted work and stated assumptions.

    python -m tests.benchmarks.cluster_plan            prints the tables
    python -m tests.benchmarks.cluster_plan --write    puts them between the marks in docs/clusters.md

Counted: operations and tokens of a step (dinov2.train.cost, which a test holds against fvcore) and parameters
(on the meta device). Assumed: the constants below. Nothing here was measured on GPUs.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from dinov2.config import read
from dinov2.models.config import ViTConfig
from dinov2.models.load import make_backbone
from dinov2.ssl.networks import Branch
from dinov2.train.config import TrainConfig
from dinov2.train.cost import work_of

PAGE = Path(__file__).parents[2] / "docs" / "clusters.md"
RECIPES = ("dinov2_vitl14", "dinov2_vitg14")
GPUS = (16, 32, 64, 128, 256)

PEAK = 989e12  # FLOP/s in bf16 of an H100, dense, by its maker
SHARE = 0.4  # of the peak that a step reaches
LINK = 50e9  # bytes/s of one GPU to other nodes: a 400 Gbit/s adapter for each
WATTS = 700 * 1.3  # a GPU at its limit, and what stands around it
MEMORY = 80e9  # bytes of a GPU
PICTURE = 110e3  # bytes of a stored picture
STATE = 20  # bytes a parameter: student, gradient, two averages of AdamW, teacher, all float32
TRAFFIC = 16  # bytes a parameter and step: student gathered twice, teacher once, gradients summed; float32
ACTIVATION = 34  # bytes a token, layer and unit of width that a block keeps for its backward in bf16


@dataclass(frozen=True)
class Plan:
    """One recipe on one number of GPUs."""

    gpus: int
    pictures: int  # a GPU and step
    compute: float  # seconds a step
    traffic: float  # seconds a step, if nothing of it is hidden
    memory: float  # bytes a GPU
    steps: int

    @property
    def seconds(self) -> float:
        """Of a step where traffic hides behind the products as far as it can."""
        return max(self.compute, self.traffic)

    def row(self) -> list[str]:
        rate = self.gpus * self.pictures / self.seconds
        hours = self.seconds * self.steps * self.gpus / 3600
        return [
            f"{self.gpus}",
            f"{self.pictures}",
            f"{1e3 * self.compute:.0f} / {1e3 * self.traffic:.0f} ms",
            f"{rate:,.0f}",
            f"{rate * PICTURE / 1e9:.2f} GB/s",
            f"{self.memory / 1e9:.0f} GB{' *' if self.memory > MEMORY else ''}",
            f"{self.seconds * self.steps / 86400:.1f}",
            f"{hours:,.0f}",
            f"{hours * WATTS / 1e6:.1f} MWh",
        ]


HEADER = [
    *("GPUs", "pictures a GPU", "products / traffic", "pictures/s", "reads", "memory"),
    *("days", "GPU-hours", "energy"),
]


def plan(recipe: str, gpus: int) -> Plan:
    """The recipe on so many GPUs; gradients are accumulated where a GPU's share does not fit."""
    config = read(TrainConfig, [recipe, "data=-", "output=-"], recipes="train")
    work, vit = work_of(config), config.network()
    assert work is not None and isinstance(vit, ViTConfig)
    parameters = parameters_of(config)
    pictures = config.batch // gpus
    kept = work.tokens * vit.dim * vit.depth * ACTIVATION * (1 - vit.drop_path)
    between = (gpus - 1) / gpus
    return Plan(
        gpus=gpus,
        pictures=pictures,
        compute=pictures * work.flops / (SHARE * PEAK),
        traffic=TRAFFIC * parameters * between / LINK,
        memory=STATE * parameters / gpus + pictures * kept,
        steps=config.steps,
    )


def parameters_of(config: TrainConfig) -> int:
    """Of one network with its heads."""
    with torch.device("meta"):
        branch = Branch(make_backbone(config.network()), config.heads)
    return sum(parameter.numel() for parameter in branch.parameters())


def tables() -> str:
    """Both recipes as Markdown."""
    parts = []
    for recipe in RECIPES:
        config = read(TrainConfig, [recipe, "data=-", "output=-"], recipes="train")
        work = work_of(config)
        assert work is not None
        size = parameters_of(config) / 1e9
        parts += [
            f"**{recipe}**: {size:.2f} billion parameters with heads,",
            f"{work.flops / 1e12:.2f} TFLOP a picture, {config.steps:,} steps of {config.batch:,} pictures.",
            "",
            "| " + " | ".join(HEADER) + " |",
            "|" + "---|" * len(HEADER),
            *("| " + " | ".join(plan(recipe, gpus).row()) + " |" for gpus in GPUS),
            "",
        ]
    return "\n".join(parts)


def main() -> None:
    if "--write" not in sys.argv:
        print(tables())
        return
    marks = re.compile(r"(<!-- tables -->\n).*?(<!-- end -->)", re.DOTALL)
    PAGE.write_text(marks.sub(lambda found: found.group(1) + tables() + found.group(2), PAGE.read_text()))


if __name__ == "__main__":
    main()
