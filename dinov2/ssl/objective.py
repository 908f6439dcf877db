"""What the student learns from the teacher: targets, losses by name, and figures that show collapse."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dinov2.losses.cross_entropy import dino, ibot
from dinov2.losses.gram import gram
from dinov2.losses.koleo import koleo
from dinov2.losses.targets import CHUNK, Targets, centered, score_totals, sinkhorn, slices, wide
from dinov2.models.backbone import Backbone
from dinov2.optim import Rates, TeacherConfig
from dinov2.ssl.anchor import anchor_patches
from dinov2.ssl.figures import figures
from dinov2.ssl.networks import Branch, Projections


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the losses; 0 leaves one out."""

    dino: float = 1.0  # between crops of an image
    ibot: float = 1.0  # at masked patches
    koleo: float = 0.1  # entropy of the features
    gram: float = 0.0  # between the likenesses of patches and those for an earlier teacher (DINOv3)
    koleo_across_ranks: bool = False  # neighbours among all ranks' features
    koleo_group: int = 0  # … of groups of so many ranks (DINOv3: 16); 0: all
    chunk: int = CHUNK  # float32 scores at a time in targets and cross-entropies; 0: all, -1: by the device
    fused: bool = True  # on CUDA, cross-entropies by a kernel of Triton

    def weights(self) -> dict[str, float]:
        return {name: weight for name in LOSSES if (weight := getattr(self, name))}


@dataclass(frozen=True)
class Views:
    """A batch on the device, normalised; crops lie crop by crop (all first views, all second views, …)."""

    global_crops: Float[Tensor, "2*batch channels height width"]
    local_crops: Float[Tensor, "locals*batch channels small small"] | None
    masks: Bool[Tensor, "2*batch patches"] | None  # where the patch loss looks; None: there is none
    gram_crops: Float[Tensor, "2*batch channels large large"] | None = None  # what an anchor sees, if others
    hidden: bool = True  # from the student, what the masks show (not where a frozen teacher is distilled)
    origins: Int[Tensor, "2*batch 2"] | None = None  # places in the batch of the pictures that a view shows

    def crops(self) -> list[Tensor]:
        return [self.global_crops] if self.local_crops is None else [self.global_crops, self.local_crops]

    def parts(self, count: int) -> Iterator["Views"]:
        """The same in micro-batches, each with all crops of its pictures."""
        batch = len(self.global_crops) // 2
        for index in range(count):
            own = slice(index * batch // count, (index + 1) * batch // count)
            yield Views(
                global_crops=_of_pictures(self.global_crops, batch, own),
                local_crops=None if self.local_crops is None else _of_pictures(self.local_crops, batch, own),
                masks=None if self.masks is None else _of_pictures(self.masks, batch, own),
                gram_crops=None if self.gram_crops is None else _of_pictures(self.gram_crops, batch, own),
                hidden=self.hidden,
                origins=None if self.origins is None else _of_pictures(self.origins, batch, own),
            )


def _of_pictures(crops: Tensor, batch: int, pictures: slice) -> Tensor:
    return crops.unflatten(0, (-1, batch))[:, pictures].flatten(0, 1)


@dataclass(frozen=True)
class Exchange:
    """What a loss may use: the student's output, the teacher's targets, and where the masks lie."""

    student: Projections
    dino: Targets
    ibot: Targets | None
    masked_crop: Tensor | None
    global_crops: int
    anchor: Float[Tensor, "globals patches dim"] | None  # patches as an earlier teacher sees them
    config: LossConfig


@dataclass(frozen=True)
class Outcome:
    """Losses by name, figures to watch, and what the next centres are made of."""

    losses: dict[str, Float[Tensor, ""]]
    figures: dict[str, Float[Tensor, ""]]
    totals: dict[str, Tensor]  # of the teacher's scores; empty where targets=sinkhorn
    features: Float[Tensor, "batch dim"]  # the teacher's CLS tokens of the first views

    def total(self, weights: dict[str, float]) -> Float[Tensor, ""]:
        """The loss: the weighted sum."""
        return torch.stack([weights[name] * loss for name, loss in self.losses.items()]).sum()

    def detached(self) -> "Outcome":
        """Without the graph, whose tensors are large."""
        losses = {name: loss.detach() for name, loss in self.losses.items()}
        return replace(self, losses=losses)


def merged(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome of a step from those of its micro-batches: means of losses and figures, sums of totals."""
    first = outcomes[0]
    return Outcome(
        losses={name: torch.stack([o.losses[name] for o in outcomes]).mean() for name in first.losses},
        figures={name: torch.stack([o.figures[name] for o in outcomes]).mean() for name in first.figures},
        totals={name: torch.stack([o.totals[name] for o in outcomes]).sum(dim=0) for name in first.totals},
        features=torch.cat([outcome.features for outcome in outcomes]),
    )


def _dino(seen: Exchange) -> Float[Tensor, ""]:
    own = seen.student.dino
    config = seen.config
    return dino(own.bottleneck, own.prototypes, seen.dino, chunk=config.chunk, fused=config.fused)


def _ibot(seen: Exchange) -> Float[Tensor, ""]:
    own = seen.student.ibot
    assert own is not None and seen.ibot is not None and seen.masked_crop is not None
    return ibot(
        own.bottleneck,
        own.prototypes,
        seen.ibot,
        seen.masked_crop,
        seen.global_crops,
        chunk=seen.config.chunk,
        fused=seen.config.fused,
    )


def _koleo(seen: Exchange) -> Float[Tensor, ""]:
    """Each global view by itself, the two summed, as the published training does (the paper: the first)."""
    views = seen.student.cls[: seen.global_crops].chunk(2)
    config = seen.config
    first, second = (
        koleo(view, across_ranks=config.koleo_across_ranks, group=config.koleo_group) for view in views
    )
    return first + second


def _gram(seen: Exchange) -> Float[Tensor, ""]:
    assert seen.anchor is not None  # `objective` leaves the loss out as long as there is none
    return gram(seen.student.patches, seen.anchor)


LOSSES: dict[str, Callable[[Exchange], Float[Tensor, ""]]] = {
    "dino": _dino,
    "ibot": _ibot,
    "koleo": _koleo,
    "gram": _gram,
}


def objective(
    student: Branch,
    teacher: Branch,
    views: Views,
    rates: Rates,
    centers: dict[str, Tensor],
    *,
    losses: LossConfig,
    targets: TeacherConfig,
    anchor: Backbone | None = None,
    generator: torch.Generator | None = None,
) -> Outcome:
    """One forward of both networks and every loss with a weight.

    Args:
        centers: the centres `dino` and `ibot` of targets=centering; left as they are.
        anchor: an earlier teacher for the Gram loss, which is left out without one.
        generator: draws the student's stochastic depth.
    """
    masked = None if views.masks is None else views.masks.flatten().nonzero().squeeze(1)
    with torch.no_grad():
        seen = teacher(views.crops()[:1], masked)
        scores = {name: getattr(seen, name).scores() for name in ("dino", "ibot") if getattr(seen, name)}
        teacher_cls = seen.cls
        del seen  # with normalised prototypes, which would stay while the student computes
        made = _targets(scores, centers, rates, targets, losses.chunk)
    student_says = student(views.crops(), masked, views.masks if views.hidden else None, generator)
    exchange = Exchange(
        student=student_says,
        dino=made["dino"],
        ibot=made.get("ibot"),
        masked_crop=None if masked is None or views.masks is None else masked // views.masks.shape[1],
        global_crops=len(views.global_crops),
        anchor=None if anchor is None else _anchored(anchor, views),
        config=losses,
    )
    centering = targets.targets == "centering"
    return Outcome(
        losses={
            name: LOSSES[name](exchange) for name in losses.weights() if name != "gram" or anchor is not None
        },
        figures=_figures(exchange, teacher_cls),
        totals={name: score_totals(own) for name, own in scores.items()} if centering else {},
        features=teacher_cls.chunk(2)[0],
    )


def _anchored(anchor: Backbone, views: Views) -> Float[Tensor, "globals patches dim"]:
    shown = views.global_crops if views.gram_crops is None else views.gram_crops
    height, width = views.global_crops.shape[-2:]
    return anchor_patches(anchor, shown, (height, width))


def first_centers(student: Branch, device: torch.device) -> dict[str, Tensor]:
    """Centres before the first batch: zero."""
    heads = {"dino": student.dino_head, "ibot": student.ibot_head or student.dino_head}
    return {name: torch.zeros(head.prototypes.weight.shape[0], device=device) for name, head in heads.items()}


def _targets(
    scores: dict[str, Float[Tensor, "rows prototypes"]],
    centers: dict[str, Tensor],
    rates: Rates,
    config: TeacherConfig,
    chunk: int,
) -> dict[str, Targets]:
    warmth = rates.teacher_temperature
    if config.targets == "centering":
        return {name: centered(own, centers[name], warmth) for name, own in scores.items()}
    return dict(zip(scores, sinkhorn(list(scores.values()), warmth, chunk=chunk), strict=True))


@torch.no_grad()
def _figures(seen: Exchange, teacher: Tensor) -> dict[str, Float[Tensor, ""]]:
    rows, prototypes = seen.dino.scores.shape
    parts = slices(rows, prototypes, seen.config.chunk, seen.dino.columns.device)
    pairs = ((seen.dino.of(part), wide(seen.student.dino.scores(part))) for part in parts)
    return figures(pairs, teacher)
