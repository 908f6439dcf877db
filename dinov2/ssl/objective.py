"""What the student learns from the teacher: targets, losses by name, and figures that show collapse."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dinov2.losses.cross_entropy import STUDENT_TEMPERATURE, dino, ibot
from dinov2.losses.koleo import koleo
from dinov2.losses.targets import centered, next_center, sinkhorn
from dinov2.optim import Rates, TeacherConfig
from dinov2.ssl.networks import Branch, Scores


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the losses; 0 leaves one out."""

    dino: float = 1.0  # between crops of an image
    ibot: float = 1.0  # at masked patches
    koleo: float = 0.1  # entropy of the features
    koleo_across_ranks: bool = False  # neighbours among all ranks' features

    def weights(self) -> dict[str, float]:
        return {name: weight for name in LOSSES if (weight := getattr(self, name))}


@dataclass(frozen=True)
class Views:
    """A batch on the device, normalised; crops lie crop by crop (all first views, all second views, …)."""

    global_crops: Float[Tensor, "2*batch channels height width"]
    local_crops: Float[Tensor, "locals*batch channels small small"] | None
    masks: Bool[Tensor, "2*batch patches"] | None  # None: nothing is masked, for want of a patch loss

    def crops(self) -> list[Tensor]:
        return [self.global_crops] if self.local_crops is None else [self.global_crops, self.local_crops]


@dataclass(frozen=True)
class Exchange:
    """What a loss may use: both networks' scores, the teacher's targets, and where the masks lie."""

    student: Scores
    dino_targets: Float[Tensor, "2*batch prototypes"]
    ibot_targets: Float[Tensor, "masked prototypes"]
    masked_crop: Tensor | None
    global_crops: int
    config: LossConfig


@dataclass(frozen=True)
class Outcome:
    """Losses by name, figures to watch, and the centres to take over if the step is applied."""

    losses: dict[str, Float[Tensor, ""]]
    figures: dict[str, Float[Tensor, ""]]
    centers: dict[str, Tensor]


def _dino(seen: Exchange) -> Float[Tensor, ""]:
    return dino(seen.student.dino, seen.dino_targets)


def _ibot(seen: Exchange) -> Float[Tensor, ""]:
    assert seen.masked_crop is not None  # the feed draws masks where there is a patch loss
    return ibot(seen.student.ibot, seen.ibot_targets, seen.masked_crop, seen.global_crops)


def _koleo(seen: Exchange) -> Float[Tensor, ""]:
    """Each global view by itself, the two summed, as the published training does (the paper: the first)."""
    views = seen.student.cls[: seen.global_crops].chunk(2)
    first, second = (koleo(view, across_ranks=seen.config.koleo_across_ranks) for view in views)
    return first + second


LOSSES: dict[str, Callable[[Exchange], Float[Tensor, ""]]] = {"dino": _dino, "ibot": _ibot, "koleo": _koleo}


def objective(
    student: Branch,
    teacher: Branch,
    views: Views,
    rates: Rates,
    centers: dict[str, Tensor],
    *,
    losses: LossConfig,
    targets: TeacherConfig,
    generator: torch.Generator | None = None,
) -> Outcome:
    """One forward of both networks and every loss with a weight.

    Args:
        centers: the centres `dino` and `ibot` of targets=centering; left as they are.
        generator: draws the student's stochastic depth.
    """
    masked = None if views.masks is None else views.masks.flatten().nonzero().squeeze(1)
    with torch.no_grad():
        seen = teacher(views.crops()[:1], masked)
        dino_targets, dino_center = _targets(seen.dino, centers["dino"], rates, targets)
        ibot_targets, ibot_center = _targets(seen.ibot, centers["ibot"], rates, targets)
    scores = student(views.crops(), masked, views.masks, generator)
    exchange = Exchange(
        student=scores,
        dino_targets=dino_targets,
        ibot_targets=ibot_targets,
        masked_crop=None if masked is None or views.masks is None else masked // views.masks.shape[1],
        global_crops=len(views.global_crops),
        config=losses,
    )
    return Outcome(
        losses={name: LOSSES[name](exchange) for name in losses.weights()},
        figures=_figures(exchange, seen),
        centers={"dino": dino_center, "ibot": ibot_center},
    )


def first_centers(student: Branch, device: torch.device) -> dict[str, Tensor]:
    """Centres before the first batch: zero."""
    heads = {"dino": student.dino_head, "ibot": student.ibot_head or student.dino_head}
    return {name: torch.zeros(head.prototypes.weight.shape[0], device=device) for name, head in heads.items()}


def _targets(
    scores: Float[Tensor, "rows prototypes"], center: Tensor, rates: Rates, config: TeacherConfig
) -> tuple[Float[Tensor, "rows prototypes"], Tensor]:
    if config.targets == "sinkhorn":
        return sinkhorn(scores, rates.teacher_temperature), center
    following = next_center(center, scores, config.center_momentum)
    return centered(scores, center, rates.teacher_temperature), following


@torch.no_grad()
def _figures(seen: Exchange, teacher: Scores) -> dict[str, Float[Tensor, ""]]:
    """Entropies in nats, the share of prototypes that are somebody's first choice, spread of the features."""
    own = seen.student.dino[: seen.global_crops].float()
    favourites = seen.dino_targets.argmax(dim=1).unique().numel()
    possible = min(seen.dino_targets.shape)
    unit = torch.nn.functional.normalize(teacher.cls.float(), dim=1)
    return {
        "entropy.teacher": _entropy(seen.dino_targets),
        "entropy.student": _entropy(torch.softmax(own / STUDENT_TEMPERATURE, dim=1)),
        "prototypes.used": torch.tensor(favourites / possible),
        "features.std": unit.std(dim=0).mean() * unit.shape[1] ** 0.5,
    }


def _entropy(rows: Float[Tensor, "rows prototypes"]) -> Float[Tensor, ""]:
    return torch.special.entr(rows).sum(dim=1).mean()
