"""Copy detection by contrast (SSCD, arXiv 2202.10261): one network, two edited views, no teacher."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dinov2.config import one_of
from dinov2.exits import UserError
from dinov2.losses.contrastive import contrastive, sharing
from dinov2.optim import Rates
from dinov2.ssl.networks import Branch
from dinov2.ssl.objective import Outcome, Views

POOLINGS = ("cls", "mean", "gem")


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """The descriptor and its losses, where method=contrastive."""

    dimension: int = 512  # of the descriptor
    pooling: str = "cls"  # what it is projected from: cls, mean of patches, gem (for ResNets)
    temperature: float = 0.05  # of InfoNCE
    entropy: float = 30.0  # weight of the entropy beside InfoNCE's 1; 0 leaves it out

    def check(self) -> None:
        one_of(self.pooling, POOLINGS, "contrastive.pooling")
        if self.dimension < 1 or self.temperature <= 0 or self.entropy < 0:
            raise UserError("contrastive: dimension and temperature should be above 0, entropy not below")

    def weights(self) -> dict[str, float]:
        return {"infonce": 1.0} | ({"koleo": self.entropy} if self.entropy else {})


def contrastive_objective(
    student: Branch,
    teacher: Branch,
    views: Views,
    rates: Rates,
    centers: Mapping[str, Tensor],
    *,
    config: ContrastiveConfig,
    generator: torch.Generator | None = None,
) -> Outcome:
    """One forward of the student and both losses; of the shape of `dinov2.ssl.objective.objective`.

    Rates and centres are not used. The teacher, a copy or an average of the student, is only exported: it
    takes over the statistics of the student's batch norms, since it sees no batch itself.
    """
    assert views.origins is not None  # the feed says whose views they are
    descriptors = student(views.crops(), generator=generator).cls
    with torch.no_grad():
        for kept, buffer in zip(teacher.buffers(), student.buffers(), strict=True):
            kept.copy_(buffer)
    infonce, koleo = contrastive(descriptors, views.origins, temperature=config.temperature)
    losses = {"infonce": infonce, "koleo": koleo}
    return Outcome(
        losses={name: losses[name] for name in config.weights()},
        figures=_figures(descriptors, views.origins),
        totals={},
        features=descriptors.detach().chunk(2)[0],
    )


@torch.no_grad()
def _figures(descriptors: Float[Tensor, "views dim"], origins: Tensor) -> dict[str, Float[Tensor, ""]]:
    """Among this rank's views: how many have a match nearest to them, how similar the nearest other is."""
    unit = descriptors.detach().float()
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    related = sharing(origins, origins)
    with torch.autocast(unit.device.type, enabled=False):
        similarity = (unit @ unit.T).masked_fill(itself, -2.0)
    nearest = similarity.argmax(dim=1, keepdim=True)
    return {
        "matches.nearest": related.gather(1, nearest).float().mean(),
        "similarity.match": similarity[related & ~itself].mean(),
        "similarity.nearest_other": similarity.masked_fill(related, -2.0).amax(dim=1).mean(),
        "features.std": unit.std(dim=0).mean() * unit.shape[1] ** 0.5,
    }
