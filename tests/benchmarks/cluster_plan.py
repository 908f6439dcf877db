"""The tables of docs/clusters.md: a recipe on so many GPUs, from counted work and stated assumptions.

    python -m tests.benchmarks.cluster_plan            prints the tables
    python -m tests.benchmarks.cluster_plan --write    puts them between the marks in docs/clusters.md

Counted: operations and tokens of a step (dinov2.train.cost, which a test holds against fvcore) and parameters
(on the meta device); bytes of state and traffic are held against measured ones on 2 and 4 processes in
tests/dinov2/train/test_scale.py. Assumed: the constants below. Nothing here was measured on GPUs.
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
RECIPES = ("dinov2_vitl14", "dinov2_vitg14", "dinov3_vit7b16")
GPUS = (8, 16, 32, 64, 128, 256)
NODE = 8  # GPUs

PEAK = 989e12  # FLOP/s in bf16 of an H100, dense, by its maker
SHARE = 0.4  # of the peak that a step reaches
LINK = 50e9  # bytes/s of one GPU to other nodes: a 400 Gbit/s adapter for each
NVLINK = 450e9  # bytes/s of one GPU to those of its node, one way
WATTS = 700 * 1.3  # a GPU at its limit, and what stands around it
MEMORY = 80e9  # bytes of a GPU
PICTURE = 110e3  # bytes of a stored picture
STATE = 20  # bytes a parameter: student, gradient, two averages of AdamW, teacher, all float32
GATHERS = 3  # of all weights in a step: the student's for forward and backward, the teacher's
ACTIVATION = 34  # bytes a token, layer and unit of width that a block keeps for its backward in bf16


@dataclass(frozen=True)
class Weights:
    """Parameters of one network with its heads."""

    blocks: int
    rest: int

    @property
    def all(self) -> int:
        return self.blocks + self.rest

    def state(self, gpus: int, copies: int = 1) -> float:
        """Bytes that a GPU holds between steps, and the gradient."""
        return STATE * self.all * copies / gpus

    def within(self, gpus: int, copies: int = 1, gather: str = "fp32") -> float:
        """Bytes a GPU receives in a step from those of its copy: weights, parts of gradients."""
        shards = gpus // copies
        gathered = {"fp32": 4, "bf16": 2}[gather] * self.blocks + 4 * self.rest
        return (GATHERS * gathered + 4 * self.all) * (shards - 1) / shards

    def between(self, gpus: int, copies: int = 1) -> float:
        """Bytes a GPU receives in a step from those with the same part of other copies: sums of gradients."""
        return 2 * 4 * self.all * copies / gpus * (copies - 1) / copies


@dataclass(frozen=True)
class Plan:
    """One recipe on one number of GPUs."""

    gpus: int
    pictures: int  # a GPU and step
    compute: float  # seconds a step
    flat: float  # seconds of traffic a step, one copy of the weights split over all GPUs, in float32
    by_node: float  # the same with a copy in each node, gathered in bf16
    memory: float  # bytes a GPU, with a copy in each node
    steps: int

    @property
    def seconds(self) -> float:
        """Of a step where traffic hides behind the products as far as it can."""
        return max(self.compute, self.by_node)

    def row(self) -> list[str]:
        rate = self.gpus * self.pictures / self.seconds
        hours = self.seconds * self.steps * self.gpus / 3600
        return [
            f"{self.gpus}",
            f"{self.pictures}",
            f"{1e3 * self.compute:,.0f} ms",
            f"{1e3 * self.flat:,.0f} / {1e3 * self.by_node:,.0f} ms",
            f"{rate:,.0f}",
            f"{rate * PICTURE / 1e9:.2f} GB/s",
            f"{self.memory / 1e9:.0f} GB{' *' if self.memory > MEMORY else ''}",
            f"{self.seconds * self.steps / 86400:.1f}",
            f"{hours:,.0f}",
            f"{hours * WATTS / 1e6:.1f} MWh",
        ]


HEADER = [
    *("GPUs", "pictures a GPU", "products", "traffic flat / by node", "pictures/s", "reads", "memory"),
    *("days", "GPU-hours", "energy"),
]


def plan(recipe: str, gpus: int) -> Plan:
    """The recipe on so many GPUs; gradients are accumulated where a GPU's share does not fit."""
    config = read(TrainConfig, [recipe, "data=-", "output=-"], recipes="train")
    work, vit = work_of(config), config.network()
    assert work is not None and isinstance(vit, ViTConfig)
    weights = weights_of(config)
    pictures, nodes = config.batch // gpus, gpus // NODE
    kept = work.tokens * vit.dim * vit.depth * ACTIVATION * (1 - vit.drop_path)
    flat_link = LINK if nodes > 1 else NVLINK
    return Plan(
        gpus=gpus,
        pictures=pictures,
        compute=pictures * work.flops / (SHARE * PEAK),
        flat=weights.within(gpus) / flat_link,
        by_node=weights.within(gpus, nodes, "bf16") / NVLINK + weights.between(gpus, nodes) / LINK,
        memory=weights.state(gpus, nodes) + pictures * kept,
        steps=config.steps,
    )


def weights_of(config: TrainConfig) -> Weights:
    """Counted on the meta device."""
    with torch.device("meta"):
        branch = Branch(make_backbone(config.network()), config.heads)
    blocks = sum(p.numel() for block in branch.backbone.layers() for p in block.parameters())
    return Weights(blocks=blocks, rest=sum(p.numel() for p in branch.parameters()) - blocks)


def tables() -> str:
    """Both recipes as Markdown."""
    parts = []
    for recipe in RECIPES:
        config = read(TrainConfig, [recipe, "data=-", "output=-"], recipes="train")
        work = work_of(config)
        assert work is not None
        size = weights_of(config).all / 1e9
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
