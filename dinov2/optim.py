"""Optimisation: schedules over a run, an optimiser with a rate for each layer, clipping, and the teacher's
average.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dinov2.config import listed, one_of
from dinov2.exits import UserError
from dinov2.parallel import all_sum, copies_of, own, world

CHOICES = {"name": ("adamw", "sgd"), "schedule": ("cosine", "constant"), "clip_per": ("part", "parameter")}
UPDATES = ("momentum", "student_copy", "previous_iteration", "previous_epoch")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser and its schedules. Fractions are of the whole run: a shorter one compresses all."""

    name: str = "adamw"  # adamw, or sgd (DINO for convolutional networks)
    schedule: str = "cosine"  # of rate, weight decay and momentum: cosine; constant after warmup (v3)
    lr: float = 4e-3  # peak rate at a global batch of lr_batch
    lr_batch: int = 1024  # the batch that lr is given for
    lr_scaling: str = "sqrt"  # how the rate follows the batch: sqrt (DINOv2), linear (DINO) or none
    min_lr: float = 1e-6  # rate at the end of the cosine
    warmup: float = 0.1  # fraction of the run with a linearly rising rate
    weight_decay: float = 0.04  # at the start; none on biases, norms, LayerScale
    weight_decay_end: float = 0.4  # at the end, by a cosine
    betas: list[float] = listed(0.9, 0.999)  # of AdamW
    sgd_momentum: float = 0.9  # of SGD
    clip: float = 3.0  # largest gradient norm; 0 for no clipping
    clip_per: str = "part"  # what has that norm: part (backbone, each head) or parameter (DINO)
    layer_decay: float = 0.9  # rate of a block over that of the next one
    patch_embed_lr: float = 0.2  # further factor on the patch embedding's rate
    freeze_last_layer: float = 0.01  # fraction of the run in which the prototypes stand still
    freeze_backbone: float = 0.0  # fraction in which only fresh heads learn; the backbone's warmup follows

    def check(self) -> None:
        """Refuse unknown words, and phases that do not fit into a run."""
        for key, options in CHOICES.items():
            one_of(getattr(self, key), options, f"optim.{key}")
        self.peak_lr(self.lr_batch)
        if not (self.warmup >= 0 and self.freeze_backbone >= 0 and self.warmup + self.freeze_backbone < 1):
            raise UserError(
                f"optim.warmup={self.warmup} and optim.freeze_backbone={self.freeze_backbone} are fractions "
                "of the run, together less than 1"
            )

    def peak_lr(self, batch: int) -> float:
        """The peak rate for a global batch."""
        power = {"sqrt": 0.5, "linear": 1.0, "none": 0.0}
        return self.lr * (batch / self.lr_batch) ** power[one_of(self.lr_scaling, power, "optim.lr_scaling")]


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The teacher: what it is made of, and how its scores become targets.

    DINO's sec. 5.1 compares the kinds of teacher: only an average of students leads its student.
    """

    update: str = "momentum"  # or student_copy, previous_iteration, previous_epoch (for ablations)
    momentum: float = 0.992  # of the average at the start; 1 at the end, by a cosine
    temperature: float = 0.07  # of the targets, after the warmup
    temperature_start: float = 0.04  # at the start
    temperature_warmup: float = 0.3  # fraction of the run over which it rises linearly
    targets: str = "sinkhorn"  # sinkhorn (SwAV, DINOv2) or centering (DINO)
    center_momentum: float = 0.9  # of the centre, where targets=centering


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the schedules say at one step."""

    lr: float  # of the heads
    backbone_lr: float
    last_layer_lr: float
    weight_decay: float
    momentum_before: float  # share of itself that the teacher keeps before the student's step …
    momentum: float  # … and after it; 1 leaves the teacher alone, 0 makes it a copy
    teacher_temperature: float


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """Every schedule as a function of the step alone: nothing to store, nothing to resume."""

    optim: OptimConfig
    teacher: TeacherConfig
    steps: int
    batch: int
    pictures: int  # in the source: what an epoch is

    def at(self, step: int) -> Rates:
        optim, teacher, done = self.optim, self.teacher, step / self.steps
        lr = self._lr(done) * _ramp(done, optim.warmup)
        thawed = _ramp(done - optim.freeze_backbone, optim.warmup) if optim.freeze_backbone else 1.0
        before, after = self._kept(step)
        return Rates(
            lr=lr,
            backbone_lr=lr * thawed,
            last_layer_lr=0.0 if done < optim.freeze_last_layer else lr,
            weight_decay=self._along(optim.weight_decay, optim.weight_decay_end, done),
            momentum_before=before,
            momentum=after,
            teacher_temperature=teacher.temperature_start
            + _ramp(done, teacher.temperature_warmup) * (teacher.temperature - teacher.temperature_start),
        )

    def _lr(self, done: float) -> float:
        """The rate without its rise."""
        warmup = self.optim.warmup
        return self._along(self.optim.peak_lr(self.batch), self.optim.min_lr, (done - warmup) / (1 - warmup))

    def _along(self, start: float, end: float, done: float) -> float:
        return cosine(start, end, done) if self.optim.schedule == "cosine" else start

    def _kept(self, step: int) -> tuple[float, float]:
        """What the teacher keeps of itself before and after this step."""
        match self.teacher.update:
            case "student_copy":
                return 1.0, 0.0
            case "previous_iteration":
                return 0.0, 1.0
            case "previous_epoch":
                ends = (step + 1) * self.batch // self.pictures > step * self.batch // self.pictures
                return 1.0, 0.0 if ends else 1.0
            case _:
                return 1.0, self._along(self.teacher.momentum, 1.0, step / self.steps)


def _ramp(done: float, length: float) -> float:
    """From 0 to 1 over `length`, linearly."""
    return min(1.0, max(0.0, done) / length) if length else float(done >= 0)


def cosine(start: float, end: float, done: float) -> float:
    """From `start` at 0 to `end` at 1 along half a cosine."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))


def make_optimizer(student: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser over groups of parameters that share a rate and a decay (BEiT's layer-wise rates)."""
    depth = 1 + max((_layer(name) for name, _ in student.named_parameters()), default=0)
    groups: dict[tuple[float, bool, str], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            key = (_rate(name, depth, config), _decays(name, parameter), _schedule(name))
            groups.setdefault(key, []).append(parameter)
    settings = [
        {"params": parameters, "rate": rate, "decays": decays, "follows": follows}
        for (rate, decays, follows), parameters in groups.items()
    ]
    if config.name == "sgd":
        return torch.optim.SGD(settings, lr=0.0, momentum=config.sgd_momentum, fused=True)
    first, second = config.betas
    return torch.optim.AdamW(settings, betas=(first, second), fused=True)


def set_rates(optimizer: torch.optim.Optimizer, rates: Rates) -> None:
    """Give each group of `make_optimizer` this step's learning rate and weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * getattr(rates, group["follows"])
        group["weight_decay"] = rates.weight_decay if group["decays"] else 0.0


def clip_gradients(parts: Sequence[nn.Module], largest: float, per: str = "part") -> list[Tensor]:
    """Scale gradients to a norm of at most `largest` (0: leave them); gives each part's norm before that.

    Args:
        per: `part`: the backbone and each head by itself, as the published DINOv2 training does: a burst in a
            head, which is the larger part of a small model's gradient, does not slow the backbone down.
            `parameter`: each tensor by itself, as DINO's does.

    One collective, of as many numbers as there are norms.
    """
    of_parts = [[p for p in part.parameters() if p.grad is not None] for part in parts]
    together = [[p] for part in of_parts for p in part] if per == "parameter" else of_parts
    norms = _norms(together)
    if largest:
        for parameters, norm in zip(together, norms, strict=True):
            nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    if per == "part":
        return list(norms)
    return [of_part.square().sum().sqrt() for of_part in norms.split([len(part) for part in of_parts])]


def _norms(together: Sequence[Sequence[nn.Parameter]]) -> Float[Tensor, " groups"]:
    """The gradient norm of each group of parameters over all shards."""
    shards = [[own(p.grad) for p in group if p.grad is not None] for group in together]
    device = together[0][0].device
    local = torch.stack([nn.utils.get_total_norm(gradients).to(device) for gradients in shards])
    if world() == 1:
        return local
    return (all_sum(local.square()) / copies_of(together[0][0])).sqrt()


@torch.no_grad()
def update_average(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, in the masters' float32."""
    if momentum == 1:
        return
    average = get_ema_multi_avg_fn(momentum)
    average(list(teacher.parameters()), list(student.parameters()), 0)


def _schedule(name: str) -> str:
    """The field of `Rates` that a parameter's rate follows."""
    if ".prototypes." in name:
        return "last_layer_lr"
    return "backbone_lr" if name.startswith("backbone.") else "lr"


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
