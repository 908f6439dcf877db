"""Optimisation: schedules over a run, AdamW with a rate for each layer, clipping, the teacher's average."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dinov2.config import listed, one_of
from dinov2.parallel import whole


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedules. Fractions are of the whole run: a shorter run compresses all of them."""

    lr: float = 4e-3  # peak rate at a global batch of lr_batch
    lr_batch: int = 1024  # the batch that lr is given for
    lr_scaling: str = "sqrt"  # how the rate follows the batch: sqrt (DINOv2), linear (DINO) or none
    min_lr: float = 1e-6  # rate at the end of the cosine
    warmup: float = 0.1  # fraction of the run with a linearly rising rate
    weight_decay: float = 0.04  # at the start; none on biases, norms, LayerScale
    weight_decay_end: float = 0.4  # at the end, by a cosine
    betas: list[float] = listed(0.9, 0.999)  # of AdamW
    clip: float = 3.0  # largest gradient norm of backbone and of each head; 0 for no clipping
    layer_decay: float = 0.9  # rate of a block over that of the next one
    patch_embed_lr: float = 0.2  # further factor on the patch embedding's rate
    freeze_last_layer: float = 0.01  # fraction of the run in which the prototypes stand still

    def peak_lr(self, batch: int) -> float:
        """The peak rate for a global batch."""
        power = {"sqrt": 0.5, "linear": 1.0, "none": 0.0}
        return self.lr * (batch / self.lr_batch) ** power[one_of(self.lr_scaling, power, "optim.lr_scaling")]


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The teacher: an average of the student, and how its scores become targets."""

    momentum: float = 0.992  # of the average at the start; 1 at the end, by a cosine
    temperature: float = 0.07  # of the targets, after the warmup
    temperature_start: float = 0.04  # at the start
    temperature_warmup: float = 0.3  # fraction of the run over which it rises linearly
    targets: str = "sinkhorn"  # sinkhorn (SwAV, DINOv2) or centering (DINO)
    center_momentum: float = 0.9  # of the centre, where targets=centering


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the schedules say at one step."""

    lr: float
    last_layer_lr: float
    weight_decay: float
    momentum: float
    teacher_temperature: float


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """Every schedule as a function of the step alone: nothing to store, nothing to resume."""

    optim: OptimConfig
    teacher: TeacherConfig
    steps: int
    batch: int

    def at(self, step: int) -> Rates:
        optim, teacher, done = self.optim, self.teacher, step / self.steps
        peak = optim.peak_lr(self.batch)
        if done < optim.warmup:
            lr = peak * done / optim.warmup
        else:
            lr = cosine(peak, optim.min_lr, (done - optim.warmup) / (1 - optim.warmup))
        warm = min(1.0, done / teacher.temperature_warmup) if teacher.temperature_warmup else 1.0
        return Rates(
            lr=lr,
            last_layer_lr=0.0 if done < optim.freeze_last_layer else lr,
            weight_decay=cosine(optim.weight_decay, optim.weight_decay_end, done),
            momentum=cosine(teacher.momentum, 1.0, done),
            teacher_temperature=teacher.temperature_start
            + warm * (teacher.temperature - teacher.temperature_start),
        )


def cosine(start: float, end: float, done: float) -> float:
    """From `start` at 0 to `end` at 1 along half a cosine."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))


def adamw(student: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over groups of parameters that share a rate and a decay (BEiT's layer-wise rates)."""
    depth = 1 + max((_layer(name) for name, _ in student.named_parameters()), default=0)
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            key = (_rate(name, depth, config), _decays(name, parameter), name.endswith("prototypes.weight"))
            groups.setdefault(key, []).append(parameter)
    first, second = config.betas
    return torch.optim.AdamW(
        [
            {"params": parameters, "rate": rate, "decays": decays, "last_layer": last}
            for (rate, decays, last), parameters in groups.items()
        ],
        betas=(first, second),
        fused=True,
    )


def set_rates(optimizer: torch.optim.Optimizer, rates: Rates) -> None:
    """Give each group of `adamw` this step's learning rate and weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * (rates.last_layer_lr if group["last_layer"] else rates.lr)
        group["weight_decay"] = rates.weight_decay if group["decays"] else 0.0


def clip_gradients(parts: Iterable[nn.Module], largest: float) -> list[Tensor]:
    """Scale each part's gradient to a norm of at most `largest` (0: leave it); gives the norms before that.

    The backbone and each head by themselves, as the published training does: a burst in a head, which is the
    larger part of a small model's gradient, does not slow the backbone down.
    """
    norms = []
    for part in parts:
        gradients = [parameter.grad for parameter in part.parameters() if parameter.grad is not None]
        norms.append(whole(nn.utils.get_total_norm(gradients)))
        if largest:
            nn.utils.clip_grads_with_norm_(part.parameters(), largest, norms[-1])
    return norms


@torch.no_grad()
def update_average(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, in the masters' float32."""
    average = get_ema_multi_avg_fn(momentum)
    average(list(teacher.parameters()), list(student.parameters()), 0)


def _layer(name: str) -> int:
    """0 for what feeds the first block, i for the i-th block (from 1), else -1: behind the last block."""
    words = name.split(".")
    if "blocks" in words:
        return int(words[words.index("blocks") + 1]) + 1
    feeds = ("pos_embed", "patch_embed", "mask_token", "cls_token", "register_tokens")
    return 0 if any(word in feeds for word in words) else -1


def _rate(name: str, depth: int, config: OptimConfig) -> float:
    layer = _layer(name)
    if layer < 0:
        return 1.0
    rate = config.layer_decay ** (depth - layer)
    return rate * config.patch_embed_lr if "patch_embed" in name.split(".") else rate


def _decays(name: str, parameter: nn.Parameter) -> bool:
    """No decay on biases, norms and LayerScale, all of them vectors."""
    return parameter.ndim > 1 and not name.endswith(".bias")
