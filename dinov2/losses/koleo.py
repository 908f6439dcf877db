"""KoLeo: spreads features by pushing each away from its nearest neighbour."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from dinov2.parallel import all_gather, rank, world

EPSILON = 1e-8


def koleo(
    cls: Float[Tensor, "batch dim"], *, across_ranks: bool = False, group: int = 0
) -> Float[Tensor, ""]:
    """Nearest-neighbour entropy of L2-normalised features (DINOv2 sec. 4): -mean log(distance + 1e-8).

    In float32 always: in half precision the epsilon vanishes and two equal features give an infinite loss.

    Args:
        cls: features before the head, of one view. A batch of one has no neighbour: zero.
        across_ranks: neighbours among the features of all ranks, not of this one alone.
        group: of groups of so many neighbouring ranks only (DINOv3: 16); 0 for all.
    """
    with torch.autocast(cls.device.type, enabled=False):
        own = functional.normalize(cls.float(), dim=1)
        everyone = all_gather(own, group) if across_ranks else own
        if everyone.shape[0] < 2:
            return own.sum() * 0.0
        itself = torch.zeros(own.shape[0], everyone.shape[0], dtype=torch.bool, device=own.device)
        itself.diagonal(rank() % (group or world()) * own.shape[0] if across_ranks else 0).fill_(True)
        return nearest_entropy(own, everyone, itself)


def nearest_entropy(
    own: Float[Tensor, "batch dim"], everyone: Float[Tensor, "all dim"], excluded: Bool[Tensor, "batch all"]
) -> Float[Tensor, ""]:
    """-mean log(distance to the nearest + 1e-8) of rows of length 1, in their type.

    Args:
        excluded: who is no neighbour, oneself at least. A row that has nobody left counts as zero.
    """
    similarity = own.detach() @ everyone.detach().T
    neighbour = similarity.masked_fill_(excluded, -2.0).argmax(dim=1)
    # The epsilon inside the norm keeps the gradient finite where a neighbour is an exact duplicate.
    difference = own - everyone[neighbour]
    distance = (difference.square().sum(dim=1) + EPSILON**2).sqrt()
    return -(torch.log(distance + EPSILON) * ~excluded.all(dim=1)).mean()
