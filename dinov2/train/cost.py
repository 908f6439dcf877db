"""What a run costs: floating-point operations by a closed formula, the device's rate, hours and energy."""

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from dinov2.models.config import ViTConfig
from dinov2.parallel import world
from dinov2.ssl.networks import HeadConfig
from dinov2.train.config import TrainConfig

# Dense bf16 rate in TFLOP/s as the makers state it, by what torch calls the device; float32 is measured.
PEAKS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
}
WATTS = {"cuda": 700.0, "mps": 30.0, "cpu": 65.0}  # assumed where watch.watts gives nothing


def vit_flops(vit: ViTConfig, side: int, share: float = 1.0, finished: float | None = None) -> float:
    """Operations (an addition is one, a multiplication another) of one crop's way through the backbone.

    Matrix products only: norms, activations and softmax are below a hundredth. With n tokens of width d, a
    block has 8nd² for qkv and projection, 4n²d for attention, and 4ndh or, gated, 6ndh for h hidden units.

    Args:
        share: of the crops that a block's branches compute, 1 - drop_path in training.
        finished: tokens that go on from the last block's attention; None: all.
    """
    patches = (side // vit.patch) ** 2
    tokens = 1 + vit.registers + patches
    matrices = 3 if vit.ffn == "swiglu" else 2
    attention = 6 * tokens * vit.dim**2 + 4 * tokens**2 * vit.dim
    rest = 2 * vit.dim**2 + 2 * matrices * vit.dim * vit.hidden  # of a token
    blocks = vit.depth * attention + ((vit.depth - 1) * tokens + (finished or tokens)) * rest
    return share * blocks + 2 * patches * vit.dim * vit.channels * vit.patch**2


def head_flops(head: HeadConfig, dim: int) -> float:
    """Operations of one token's way through a head."""
    widths = [dim, *[head.hidden] * (head.layers - 1), head.bottleneck, head.prototypes]
    return 2.0 * sum(before * after for before, after in pairwise(widths))


@dataclass(frozen=True)
class Work:
    """What one picture costs in a step; nothing where the backbone is not one of our ViTs."""

    flops: float  # of both networks, forward and backward
    tokens: int  # that the student sees


def work_of(config: TrainConfig) -> Work | None:
    """A step's work for each picture: a backward counts as two forwards, recomputation does not count."""
    vit, augment = config.model.network(config.augment.global_size), config.augment
    if not isinstance(vit, ViTConfig):
        return None
    sides = [augment.global_size] * 2 + [augment.local_size] * augment.local_crops
    ibot = config.heads.ibot if config.heads.separate else config.heads.dino
    patches = (augment.global_size // vit.patch) ** 2
    masked = 2 * patches * config.masks.probability * sum(config.masks.ratio) / 2 if config.losses.ibot else 0
    cls, patch = (head_flops(head, vit.dim) for head in (config.heads.dino, ibot))
    finished = [1 + masked / 2] * 2 + [1] * augment.local_crops if config.trims() else [None] * len(sides)
    crops = list(zip(sides, finished, strict=True))
    teacher = sum(vit_flops(vit, side, 1, some) for side, some in crops[:2]) + 2 * cls + masked * patch
    seen = sum(vit_flops(vit, side, 1 - vit.drop_path, some) for side, some in crops)
    student = seen + len(sides) * cls + masked * patch
    tokens = sum(1 + vit.registers + (side // vit.patch) ** 2 for side in sides)
    return Work(flops=teacher + 3 * student, tokens=tokens)


def peak_flops(config: TrainConfig, device: torch.device) -> float:
    """The rate of matrix products in FLOP/s that utilisation is a share of.

    `watch.peak_tflops`, else what the maker states for a known GPU in bf16, else what a large product
    reaches here and now: on a machine that others share that is too low, and the utilisation too high.
    """
    if config.watch.peak_tflops:
        return config.watch.peak_tflops * 1e12
    if device.type == "cuda" and config.precision == "bf16":
        name = torch.cuda.get_device_name(device)
        known = [rate for word, rate in PEAKS.items() if all(part in name for part in word.split())]
        if known:
            return known[0] * 1e12
    return measured_flops(device, torch.bfloat16 if config.precision == "bf16" else torch.float32)


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The best of a few large matrix products, in FLOP/s."""
    side = 4096 if device.type == "cuda" else 512
    left = torch.randn(side, side, device=device, dtype=dtype, generator=torch.Generator(device))
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        float((left @ left)[0, 0])  # reading a number waits for the device
        best = min(best, time.perf_counter() - began)
    return 2.0 * side**3 / best


def describe(device: torch.device) -> dict[str, Any]:
    """Kind, name and number of what the run computes on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"kind": device.type, "name": name, "processes": world()}


def spent(config: TrainConfig, lines: list[dict[str, Any]], kind: str) -> dict[str, float]:
    """Device-hours and kWh of the steps in the metrics; `kind` is the device's (cuda, cpu, mps)."""
    hours = sum(
        config.batch / line["pictures_per_second"] * line.get("ranks", 1)
        for line in lines
        if line.get("pictures_per_second")
    )
    watts = config.watch.watts or WATTS.get(kind, WATTS["cpu"])
    return {"hours": hours / 3600, "watts": watts, "kwh": hours / 3600 * watts / 1000}
