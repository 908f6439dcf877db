"""KoLeo: spreads features by pushing each away from its nearest neighbour."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from dinov2.parallel import all_gather, rank, world

EPSILON = 1e-8


def koleo(cls: Float[Tensor, "batch dim"], *, across_ranks: bool = False) -> Float[Tensor, ""]:
    """Nearest-neighbour entropy of L2-normalised features (DINOv2 sec. 4): -mean log(distance + 1e-8).

    In float32 always: in half precision the epsilon vanishes and two equal features give an infinite loss.

    Args:
        cls: features before the head, of one view. A batch of one has no neighbour: zero.
        across_ranks: neighbours among the features of all ranks, not of this one alone.
    """
    with torch.autocast(cls.device.type, enabled=False):
        own = functional.normalize(cls.float(), dim=1)
        everyone = all_gather(own) if across_ranks else own
        if everyone.shape[0] < 2:
            return own.sum() * 0.0
        first = rank() * own.shape[0] if across_ranks and world() > 1 else 0
        neighbour = _nearest(own.detach(), everyone.detach(), first)
        # The epsilon inside the norm keeps the gradient finite where a neighbour is an exact duplicate.
        difference = own - everyone[neighbour]
        distance = (difference.square().sum(dim=1) + EPSILON**2).sqrt()
        return -torch.log(distance + EPSILON).mean()


def _nearest(own: Float[Tensor, "batch dim"], everyone: Float[Tensor, "all dim"], first: int) -> torch.Tensor:
    similarity = own @ everyone.T
    rows = torch.arange(own.shape[0], device=own.device)
    similarity[rows, rows + first] = -2.0  # nobody is their own neighbour
    return similarity.argmax(dim=1)
